// Calls one function of a script: node run.mjs SCRIPT FUNCTION < arguments.json > result.json
import dns from "node:dns";
import { text } from "node:stream/consumers";

dns.lookup = (host) => {
  process.stderr.write(`The tests stay on loopback, but ${host} was looked up.\n`);
  process.exit(3);
};

const [script, name] = process.argv.slice(2);
const functions = await import(`./${script}`);
const result = await functions[name](JSON.parse(await text(process.stdin)));
process.stdout.write(JSON.stringify(result));
