// Sends the requests on standard input with backbone.js, concurrently, and prints the results.
//
// A request is a line of JSON, {"service", "message", "timeout"}, and so is a result, {"reply"} or
// {"error", "status", "stdout", "stderr"}. Bytes are in hexadecimal.
const fs = require('fs');
const { BackboneClient } = require('backbone');

const client = new BackboneClient(undefined, undefined, { encoding: null });
const hex = data => Buffer.from(data).toString('hex');

async function tell({ service, message, timeout }) {
  try {
    const reply = await client.send(service, message.map(frame => Buffer.from(frame, 'hex')), timeout * 1000);
    return { reply: (Array.isArray(reply) ? reply : [reply]).map(hex) };
  } catch (error) {
    const told = { error: error.name, status: error.status };
    return error.stdout === undefined ? told : { ...told, stdout: hex(error.stdout), stderr: hex(error.stderr) };
  }
}

const lines = fs.readFileSync(0, 'utf8').trim().split('\n');
Promise.all(lines.map(line => tell(JSON.parse(line)))).then(answers => {
  for (const answer of answers) console.log(JSON.stringify(answer));
});
