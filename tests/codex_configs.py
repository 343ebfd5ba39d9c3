"""Config files as people have them in `~/.codex/config.toml`: name -> the text as it is on disk."""

from __future__ import annotations

PROJECTS = """
[projects."/srv/code/shop"]
trust_level = "trusted"

[projects."/srv/code/a b [old]"]
trust_level = "untrusted"
"""

MCP = """
[mcp_servers.docs]
command = "npx"
args = ["-y", "docs-mcp", "--root", "/srv/docs"]
env = { "DOCS_LEVEL" = "2", NAME = "docs" }

[mcp_servers.search]
name = "search"
url = "https://search.example/mcp"
bearer_token_env_var = "SEARCH_TOKEN"
startup_timeout_sec = 20.5
"""

COMMENTED = """\
# Codex, as on the laptop.
#   model_provider = "never"

model = "gpt-5.4"            # the default one
model_reasoning_effort="high"
  approval_policy = 'on-request'   # ask = "me"

# What may be written
sandbox_mode = "workspace-write"
"""

PROVIDERS = """\
model = "llama"
model_provider = "local"  # on the desk

[model_providers.local]
name = "Local"
base_url = "http://127.0.0.1:11434/v1"
wire_api = "responses"

[model_providers."corp-relay"]
name = 'Corp'
base_url = 'https://relay.example/v1'
env_key = "CORP_KEY"
http_headers = { "X-Team" = "shop" }
"""

OWN_TABLE = """\
model_provider = "ai-zero-token"

[model_providers.ai-zero-token]
name = "ai-zero-token"
base_url = "http://127.0.0.1:8799/codex/v1"   # before azt
wire_api = "responses"
supports_websockets = true
request_max_retries = 2

[tui]
theme = "dark"
"""

FAKE_HEADERS = '''\
developer_instructions = """
[model_providers.ai-zero-token]
name = "not a table"
model_provider = "not a key"
openai_base_url = "nor this"
"""
notes = \'\'\'
[also]
model_provider = 'none'\'\'\'
model = "gpt-5.4"
'''

ARRAYS = """\
notify = [
  "notify-send",   # [with a bracket]
  "[codex]",
  ["nested", "model_provider = 'x'"],
]
model = "gpt-5.4"

[[hooks.stop]]
command = "beep"

[[hooks.stop]]
command = "say"

[hooks.stop.env]
LEVEL = "1"

[[rules]]
name = "one"
[[rules]]
name = "two"
"""

NUMBERS = """\
a = nan
b = -inf
c = 1e3
d = 0xDEAD_BEEF
e = 1_000
f = 1979-05-27T07:32:00Z
g = 07:32:00
h = 1979-05-27
i = true
j = +0.0
"""

MULTI_LINE = """\
a = \"\"\"\\
   folded \\
   text\"\"\"
b = \"\"\"one " two "" three\"\"\"
c = 1
"""

CONFIGS = {
    "array of tables": ARRAYS,
    "base url of a proxy": 'openai_base_url = "https://proxy.example/v1" # corp\nmodel = "m"\n',
    "base url single quotes": "openai_base_url = 'https://proxy.example/v1'\n",
    "blank lines only": "\n\n\n",
    "bom": "\ufeff" + COMMENTED + MCP,
    "bom alone": "\ufeff",
    "bom and crlf": "\ufeff" + (COMMENTED + PROJECTS).replace("\n", "\r\n"),
    "bom and table": "\ufeff[tui]\nanimations = false\n",
    "bom, schema, table": "\ufeff#:schema https://schema.example/codex.json\n[tui]\nx = 1\n",
    "chatgpt base url": 'chatgpt_base_url = "https://chatgpt.com/backend-api/"\nmodel = "m"\n',
    "comment at the end": COMMENTED + "\n# the end",
    "comments": COMMENTED,
    "comments only": "# nothing here yet\n# model_provider = 'x'\n",
    "crlf": (COMMENTED + PROJECTS + MCP).replace("\n", "\r\n"),
    "crlf own table": OWN_TABLE.replace("\n", "\r\n"),
    "crlf providers": PROVIDERS.replace("\n", "\r\n"),
    "crlf without an end": 'model = "m"\r\n[tui]\r\nx = 1',
    "deep tables": "[a.b.c.d]\nx = 1\n\n[a.b]\ny = 2\n\n[a]\nz = 3\n",
    "dotted keys": 'features.memories = true\nfeatures.web = false\ntui."x.y" = 1\nmodel = "m"\n',
    "dotted provider": 'model_providers.local.name = "L"\nmodel_providers.local.base_url = "u"\n',
    "duplicate words": 'model_provider_note = "x"\nold-model_provider = "y"\nmodel = "m"\n',
    "empty": "",
    "empty own table": 'model = "m"\n\n[model_providers.ai-zero-token]\n',
    "everything": COMMENTED + MCP + PROJECTS + "\n[features]\nmemories = true\n",
    "fake headers in strings": FAKE_HEADERS,
    "fake headers then tables": FAKE_HEADERS + PROJECTS,
    "indented": '  model = "m"\n  [tui]\n    x = 1\n  [ model_providers . local ]\n    name="L"\n',
    "inline empty": "model_providers = {}\n",
    "inline own table": 'model_providers = { "ai-zero-token" = { name = "n", base_url = "u", '
    'wire_api = "responses", supports_websockets = true } }\nmodel = "m"\n',
    "inline providers": 'model_providers = { local = { name = "L", base_url = "u" } }\n',
    "inline within": '[model_providers]\n"ai-zero-token" = { name = "n", base_url = "u", '
    'wire_api="responses", supports_websockets=false }\n',
    "keyring": 'cli_auth_credentials_store = "keyring"\nforced_login_method = "chatgpt"\n',
    "literal keys": "'model' = 'm'\n\"model_provider\" = 'openai'\n",
    "long line": f'model = "m" # {"x" * 5000}\nlist = [{", ".join(map(str, range(2000)))}]\n',
    "many projects": "".join(
        f'[projects."/srv/p{at}"]\ntrust_level = "trusted"\n\n' for at in range(300)
    ),
    "mcp": 'model = "m"\n' + MCP,
    "mixed line ends": 'model = "m"\r\napproval_policy = "never"\n\r\n[tui]\nx = 1\r\n',
    "multi-line strings": MULTI_LINE,
    "no final line end": 'model = "gpt-5.4"',
    "no final line end, table": COMMENTED + PROJECTS.rstrip("\n"),
    "numbers and dates": NUMBERS,
    "only tables": PROJECTS.lstrip(),
    "own header of others": "[model_providers.ai-zero-token.http_headers]\nA = 'b'\n",
    "own table": OWN_TABLE,
    "own table first": OWN_TABLE.split("\n", 2)[2] + PROVIDERS.partition("\n\n")[2],
    "own table in quotes": OWN_TABLE.replace(
        "[model_providers.ai-zero-token]", "[ 'model_providers' . \"ai-zero-token\" ] # ours"
    ),
    "own table, half": '[model_providers.ai-zero-token]\nname = "AI Zero Token"\n# more\n[tui]\n',
    "profiles": 'model = "m"\n[profiles.fast]\nmodel_provider = "openai"\n'
    'openai_base_url = "x"\n[profiles.slow]\nmodel_provider = "ai-zero-token"\n',
    "provider and url": 'model_provider = "openai"\nopenai_base_url = "http://127.0.0.1:1/v1"\n',
    "provider last": 'model = "m"\nmodel_provider = "local"',
    "providers": PROVIDERS,
    "providers header": "[model_providers]\n\n[tui]\nx = 1\n",
    "quoted key": '"model_provider" = "corp-relay"\n' + PROVIDERS.partition("\n\n")[2],
    "schema": "#:schema https://schema.example/codex.json\n" + COMMENTED,
    "schema, table": "#:schema https://schema.example/codex.json\n# mine\n[tui]\nx = 1\n",
    "spaces at the ends": 'model = "m"   \n\t\n[tui]\t \nx = 1 \t\n   ',
    "tabs": 'model\t=\t"m"\nmodel_provider\t=\t"local"\t# tab\n[tui]\n\tx\t=\t1\n',
    "unicode": 'model = "m"\n[projects."/srv/größe/日本"]\ntrust_level = "trusted" # ✓ \u2028 ok\n',
    "url behind a hash": 'model_provider = "a#b"  # "c"\nmodel = "#"\n',
}

# Where Codex's own list is asked for, these have no place for the lines of the table.
NO_PLACE_FOR_A_TABLE = {"inline empty", "inline providers"}
