// A service written with backbone.js. The first frame of a request says what it does.
const { open } = require('fs');
const { BackboneService, StatusError } = require('backbone');

function on_request(message, reply) {
  const wish = String(message[0]);
  if (wish === 'fail') throw new StatusError(3, Buffer.from('out\xff', 'latin1'), 'err\n');
  if (wish === 'throw') return Promise.reject(new RangeError('boom'));
  if (wish === 'late' && message.length > 1) { // reply when somebody opens the FIFO message[1]
    open(message[1], 'r', () => reply('late'));
  } else if (wish === 'late') {
    setTimeout(reply, 600, ['late']);
  } else if (wish === 'twice') {
    reply('first');
    setTimeout(reply, 300, 'second'); // while the next request is in progress
  } else if (wish === 'block') {
    const end = Date.now() + message[1] * 1000;
    while (Date.now() < end);
    reply('blocked');
  } else {
    reply(message);
  }
}

const service = new BackboneService(process.argv[2], on_request, { encoding: null });
process.on('SIGTERM', () => service.disconnect());
service.connect();
