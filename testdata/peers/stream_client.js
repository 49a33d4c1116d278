// Reads streams with backbone.js, as the lines of standard input say, and prints a line for each.
//
// stream is followed by JSON, the arguments of stream; next takes a part, all takes the others, and leave ends a
// stream early.
const { BackboneClient } = require('backbone');

const client = new BackboneClient();
let stderr = [], parts;
const END = Buffer.from('(end)');

function tell(...got) {
  console.log(JSON.stringify([Buffer.concat(got).toString('latin1'), Buffer.concat(stderr).toString('latin1')]));
  stderr = [];
}

async function next() {
  const { done, value } = await parts.next();
  return done ? END : value;
}

const verbs = {
  stream(rest) {
    const [service, message, timeout] = JSON.parse(rest);
    parts = client.stream(service, message, timeout * 1000, { onStderr: part => stderr.push(part) });
  },
  async next() {
    tell(await next());
  },
  async all() {
    const got = [];
    for await (const part of parts) got.push(part);
    tell(...got);
  },
  async leave() {
    await parts.return();
    tell(Buffer.from('left'));
  },
};

(async () => {
  for await (const line of require('readline').createInterface({ input: process.stdin })) {
    const [, verb, rest] = /^(\w+) ?(.*)$/.exec(line);
    try {
      await verbs[verb](rest);
    } catch (error) {
      if (error.status === undefined) throw error;
      console.log(JSON.stringify([error.name, error.status, String(error.stderr || '')]));
    }
  }
})();
