// A service that streams, written with backbone.js. The first frame of a request says what it yields.
//
// The second one names a file, to which it appends a line for each part before it yields it, and a last one
// when it ends.
const { appendFileSync, closeSync, openSync } = require('fs');
const { BackboneService, StatusError } = require('backbone');

const kinds = {
  * numbers({ note }, count, gate) {
    try {
      for (let number = 0; number < count; number++) {
        note(number);
        yield `${number}\n`;
        if (gate && number === 0) closeSync(openSync(gate)); // waits until somebody opens the FIFO
      }
    } finally {
      note('closed');
    }
  },
  async * async({ note }, count) {
    try {
      for (let number = 0; number < count; number++) {
        note(number);
        yield `${number}\n`;
        await new Promise(setImmediate);
      }
    } finally {
      note('closed');
    }
  },
  async * hang({ note, signal }) {
    yield 'one';
    await new Promise(resolve => signal.addEventListener('abort', resolve));
    note('closed');
  },
  * fail() {
    yield ['o', Buffer.alloc(0), 'ut'];
    yield '';
    throw new StatusError(3, 'rest', 'err\n');
  },
  * bytes(_, size) {
    yield Buffer.alloc(Number(size), 'x');
  },
  plain: (_, ...frames) => frames,
};

function on_request([kind, file, ...args], reply) {
  return kinds[kind]({ note: line => appendFileSync(file, `${line}\n`), signal: reply.signal }, ...args);
}

new BackboneService(process.argv[2], on_request).start();
