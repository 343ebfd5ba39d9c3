"""The files of the console: contrast of colours, sentences, size, and what they never do."""

from __future__ import annotations

import re

import pytest
from harness import ROOT

WEB = ROOT / "azt_web"
FILES = {path.relative_to(WEB).as_posix(): path for path in WEB.rglob("*") if path.is_file()}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in sorted(FILES.items())}
CODE = {name: text for name, text in TEXTS.items() if name.endswith(".js")}
LINES_MAX = 3_500  # console.md 9: never raise this
WIDTH_MAX, WIDE_MAX = 120, 3


# -- Colours (console.md 4.2) ----------------------------------------------------------------------

PAIRS = [
    *((text, behind, 4.5) for text in ("text", "text-2", "text-3") for behind in ("bg", "surface")),
    *((text, behind, 4.5) for text in ("text-2", "text-3") for behind in ("hover", "sunken")),
    *(("accent", behind, 4.5) for behind in ("surface", "accent-soft", "hover")),
    ("on-accent", "accent-fill", 4.5),
    ("on-accent", "accent-fill-hover", 4.5),
    ("focus", "bg", 3),
    *((name, f"{name}-soft", 4.5) for name in ("ok", "warn", "bad", "idle")),
    *((name, "surface", 4.5) for name in ("ok", "warn", "bad")),
    ("code-str", "code-bg", 4.5),
    ("code-key", "code-bg", 4.5),
    ("code-text", "code-bg", 4.5),
    ("line-ctl", "surface", 3),
    ("line-ctl", "bg", 3),
    *((f"{name}-solid", "track", 3) for name in ("ok", "warn", "bad")),
    ("bar-accent", "track", 3),
    *((f"c{n}", "surface", 3) for n in range(1, 6)),
]


def luminance(colour: str) -> float:
    """WCAG 2.2: relative luminance of #rrggbb."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("text", "behind", "need"), PAIRS)
def test_a_pair_of_colours_has_its_contrast(
    theme: str, text: str, behind: str, need: float
) -> None:
    found = re.findall(
        r"--([\w-]+):\s*(?:light-dark\((#\w{6}),(#\w{6})\)|(#\w{6}))", TEXTS["tokens.css"]
    )
    colours = {
        name: (light or plain, dark or plain)[theme == "dark"] for name, light, dark, plain in found
    }

    assert contrast(colours[text], colours[behind]) >= need


# -- Sentences -------------------------------------------------------------------------------------

STRING = r"'((?:[^'\\]|\\.)*)'"
ENTRIES = re.findall(rf"^  '([\w.+-]+)': \[{STRING}, {STRING}\],$", CODE["js/strings.js"], re.M)


def test_every_line_of_the_table_is_one_sentence_in_two_languages() -> None:
    lines = CODE["js/strings.js"].splitlines()
    others = [line for line in lines[2:-1] if line and not line.startswith("  // -- ")]

    assert len(others) == len(ENTRIES)
    assert len({key for key, _, _ in ENTRIES}) == len(ENTRIES), "a key stands there twice"


def test_both_languages_say_the_same_things() -> None:
    for key, english, chinese in ENTRIES:
        assert english and chinese, key
        assert sorted(re.findall(r"\{\w+\}", english)) == sorted(re.findall(r"\{\w+\}", chinese)), (
            key
        )
        assert not re.search(r"[一-鿿].*[,;?](?!\d)\s*[一-鿿]", chinese), f"{key}: half width"
        assert "!" not in english and "profile" not in english.lower(), key


def test_no_page_uses_a_sentence_that_is_not_there() -> None:
    keys = {key for key, _, _ in ENTRIES}
    for name, text in CODE.items():
        used = re.findall(r"\b(t|plural)\('([\w.]+)'", text)

        missing = [
            key
            for how, key in used
            if not ({key} if how == "t" else {f"{key}.one", f"{key}.other"}) <= keys
        ]
        assert missing == [], name


def test_every_sentence_is_used() -> None:
    code = "".join(text for name, text in CODE.items() if name != "js/strings.js")
    made = set(re.findall(r"`([\w.]+\.)\$\{", code))  # `st.${status}` and the like

    unused = [
        key
        for key, _, _ in ENTRIES
        if not re.search(rf"'{re.escape(re.sub(r'[.](one|other)$', '', key))}'", code)
        and not any(key.startswith(prefix) for prefix in made)
    ]
    assert unused == []


# -- Size and what is not there --------------------------------------------------------------------


def test_a_person_can_read_all_of_it() -> None:
    lines = {name: len(text.splitlines()) for name, text in TEXTS.items()}
    del lines["js/strings.js"], lines["snippets.txt"]  # what is said is not to be shortened

    assert sum(lines.values()) < LINES_MAX, sorted(lines.items(), key=lambda one: -one[1])


def test_lines_do_not_get_wider() -> None:
    wide = {
        f"{name}:{at}": len(line)
        for name, text in TEXTS.items()
        if name != "js/strings.js"
        for at, line in enumerate(text.splitlines(), 1)
        if len(line) > WIDTH_MAX
    }

    assert len(wide) <= WIDE_MAX, wide


FORBIDDEN = (
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|"
    r"\bstyle=|\bon[a-z]+=\"|javascript:|cssText|importScripts|set(?:Timeout|Interval)\(['\"`]"
)


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_text_never_becomes_code(name: str) -> None:
    assert re.findall(FORBIDDEN, TEXTS[name]) == []


def test_modules_are_imported_by_relative_path_and_pages_never_import_each_other() -> None:
    for name, text in CODE.items():
        for target in re.findall(r"from '([^']+)'", text):
            assert re.match(r"\.\.?/[\w./]+\.js$", target), (name, target)
            if name.startswith("js/pages/"):
                assert target.startswith("../"), (name, target)


def test_only_one_module_fetches() -> None:
    callers = [name for name, text in CODE.items() if re.search(r"\bfetch\(|EventSource", text)]

    assert callers == ["js/api.js"]


def test_nothing_from_the_gateway_is_kept_in_the_browser() -> None:
    """`localStorage` in one module, for choices alone; the Playground keeps texts for the tab."""
    callers = [name for name, text in CODE.items() if "localStorage" in text]
    kept = {key for text in CODE.values() for key in re.findall(r"setPref\('([\w.]+)'", text)}

    assert callers == ["js/i18n.js"]
    assert not any(re.search("token|secret|email|prompt", key) for key in kept), kept
