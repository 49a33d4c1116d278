#!/usr/bin/env node
'use strict';
/*
 * Clients and services for Backbone. Copy this one file; it requires only zeromq 6.
 *
 *   const { BackboneClient, BackboneService } = require('./backbone');
 *
 *   new BackboneClient().send('ls-service', '/tmp').then(reply => console.log(reply));
 *
 *   new BackboneService('greet', (message, reply) => reply(['hello', ...message])).start();
 *
 * The protocol is MDP/0.1 (RFC 7), and MDP/0.2 (RFC 18) for streams. A message to send is a string, a Buffer, or an array of
 * them. A service receives an array of strings. A client receives a string if the reply has
 * one frame, and an array of strings otherwise. A frame that is not UTF-8 is a Buffer instead
 * of a string; with {encoding: null}, every frame is a Buffer.
 *
 * The file is also a program: backbone.js request|service --help
 */
const crypto = require('crypto');
const fs = require('fs');
const net = require('net');
const os = require('os');
const { format, inspect } = require('util');
const { spawn } = require('child_process');
const v8 = require('v8');
const vm = require('vm');
const { Worker, parentPort, workerData } = require('worker_threads');
const { Dealer, capability, curveKeyPair } = require('zeromq');

const CLIENT = 'MDPC01', WORKER = 'MDPW01';
const READY = '\x01', REQUEST = '\x02', REPLY = '\x03', HEARTBEAT = '\x04', DISCONNECT = '\x05';

// MDP/0.2. The command bytes of its clients and its workers differ.
const CLIENT02 = 'MDPC02', WORKER02 = 'MDPW02';
const CLIENT_REQUEST = '\x01', CLIENT_PARTIAL = '\x02', CLIENT_FINAL = '\x03';
const WORKER_PARTIAL = '\x03', WORKER_FINAL = '\x04', WORKER_CREDIT = '\x07';
const STREAM_TOKEN = /^[0-9a-f]{8}\.[0-9]+~([1-9][0-9]*)(?:@[^]*)?$/; // of bbroker, for a client that takes parts
const PART_SIZE = 64 << 10; // bytes of a part at most
const MAX_COLLECTED = 64 << 20; // bytes of the parts for a client that takes only one reply
const STDERR_KEPT = 64 << 10; // bytes of standard error that a StatusError has at the end of a stream

// Times in milliseconds.
const HEARTBEAT_INTERVAL = 1000; // in both directions
const SILENCE = 5 * HEARTBEAT_INTERVAL; // after which the broker counts as lost
const COLLECT_PAUSES = [100, 60000]; // the first and the longest, between collections while a reply is missing
const DEFAULT_TIMEOUT = 3000;
const MAX_TIMEOUT = 2 ** 31; // (24 days) the limit of setTimeout; a longer timeout counts as none
const CANCEL_PATIENCE = 500; // to wait for the reply to mmi.cancel, which some brokers do not support
const MAX_CONNECTIONS = 128; // of all clients; each takes three of ZeroMQ's 1023 sockets, and four file descriptors
const IDLE_PATIENCE = 100; // before an idle connection is closed; an open one keeps the process running
const PATIENCE = 250; // with one of several brokers before the next is tried as well
const MAX_SEARCHES = 8; // of a client that try more than one broker at a time; each takes further connections
const FARTHEST = 1000; // that one of several brokers may take to tell whether it has the service
const RESERVED = 500; // for which a session has on_request after its turn has come, unless its broker has no request
const REFUSED_PAUSE = 30000; // before a service tries again that its broker refused: somebody has to change what it may

const PUBLIC_PREFIX = 'bbpub-', SECRET_PREFIX = 'bbsec-'; // of keys as text; 64 hexadecimal digits follow
const NOT_ALLOWED = '77'; // the frame by which bbroker tells a service why it sends DISCONNECT
const BUSY = ['75', 'busy']; // the frames by which a service tells a broker that it hands a request back
const MAX_FAILED = 3; // handshakes in a row that fail without a reason before it is the keys; a broker that stops may cause one
const MAX_SUSPICIONS = 2; // times that this happens before it is another broker; one that has no room closes connections, too

/**
 * @typedef {string|Buffer} Frame
 * @typedef {undefined|null|Frame|Frame[]} Message
 * @typedef {{broker?: string|string[], key?: string, brokerKey?: string}} Address
 * @typedef {{host?: string, port?: number|string, encoding?: string|null} & Address} Options
 */

/** A request or a service failed. status is the exit status that brequest would have. */
class BackboneError extends Error {
  constructor(message, status = 1, options) {
    super(message, options);
    this.name = this.constructor.name;
    this.status = status;
  }
}

/** An argument, a message or an environment variable cannot be used. */
class UsageError extends BackboneError {
  constructor(message, options) { super(message, 64, options); }
}

/** No reply arrived within the timeout. */
class RequestTimeout extends BackboneError {
  constructor(message, status = 124) { super(message, status); }
}

/** No broker could be reached within the timeout. */
class NoBroker extends RequestTimeout {
  constructor(message) { super(message, 69); }
}

/** The connection to the broker was lost before the reply. */
class ConnectionLost extends BackboneError {
  constructor(message) { super(message, 69); }
}

/** The broker sent an invalid reply, or takes no keys. */
class ProtocolError extends BackboneError {
  constructor(message) { super(message, 76); }
}

/** The broker does not admit the key. */
class NotAllowed extends BackboneError {
  constructor(message) { super(message, 77); }
}

/** The service failed. Throw it in on_request to send this failure to the client. */
class StatusError extends BackboneError {
  constructor(status, stdout = '', stderr = '') {
    super(String(stderr).trim() || `exit status ${status}`, status);
    this.stdout = stdout;
    this.stderr = stderr;
  }
}

/** Returns the frames of a message, which is undefined, null, one frame, or an array of frames. */
function framesOf(message) {
  if (message === undefined || message === null) return [];
  return (Array.isArray(message) ? message : [message]).map(bytesOf);
}

function bytesOf(frame) {
  if (ArrayBuffer.isView(frame)) return Buffer.from(frame.buffer, frame.byteOffset, frame.byteLength);
  try {
    return Buffer.from(String(frame));
  } catch (cause) {
    throw new UsageError(`cannot send ${inspect(frame)}: ${cause.message}`, { cause });
  }
}

function decode(frame, encoding) {
  if (!encoding) return frame;
  try {
    return new TextDecoder(encoding, { fatal: true, ignoreBOM: true }).decode(frame);
  } catch {
    return frame;
  }
}

/** Returns the endpoints of the brokers, each perhaps with #KEY: one or more. */
function endpointsOf(host, port, broker) {
  let source = 'broker', endpoints = broker ? [broker].flat() : [];
  if (!endpoints.length && !host && !port) {
    source = 'BACKBONE_BROKER';
    endpoints = (process.env.BACKBONE_BROKER || '').split(/\s+/).filter(Boolean);
  }
  if (endpoints.length) {
    endpoints = endpoints.map(String);
    // What libzmq says about a single endpoint is good enough.
    const valid = endpoints.length > 1 ? isEndpoint : endpoint => /^(tcp|ipc):\/\//.test(endpoint);
    const bad = endpoints.find(endpoint => !valid(endpoint));
    if (bad === undefined) return endpoints;
    // What follows # may be a secret key, by mistake.
    throw new UsageError(`${source} must be tcp://HOST:PORT or ipc:///PATH, not ${inspect(bad.split('#')[0])}`);
  }
  host = String(host || process.env.BACKBONE_HOST || '127.0.0.1');
  source = port ? 'port' : 'BACKBONE_PORT';
  port = String(port || process.env.BACKBONE_PORT || '5555');
  if (!/^[0-9]{1,5}$/.test(port) || port > 65535) {
    throw new UsageError(`${source} must be a number from 0 to 65535, not ${inspect(port)}`);
  }
  return [`tcp://${host.includes(':') ? `[${host.replace(/^\[|\]$/g, '')}]` : host}:${port}`];
}

function isEndpoint(text) {
  // ZeroMQ takes a source address before a semicolon.
  const [, port] = /^tcp:\/\/(?:[^#]*;)?(?:\[[^\][#]+\]|[^\][:;#\s]+):([0-9]{1,5})(?:#[^]*)?$/.exec(text) || [];
  return port ? port < 65536 : text.startsWith('ipc://') && text !== 'ipc://';
}

/** Returns the addresses of the brokers, each once: its endpoint, and the Keys for connections to it, if any. */
function addressesOf(host, port, { broker, key, brokerKey }) {
  const endpoints = endpointsOf(host, port, broker);
  const isIPC = endpoint => endpoint.startsWith('ipc://');
  if ((key || brokerKey) && endpoints.every(isIPC)) throw new UsageError(`an ipc endpoint takes no keys: ${endpoints[0]}`);
  const addresses = [];
  for (const text of endpoints) {
    // The environment may have keys for other endpoints than ipc ones.
    const address = isIPC(text) ? { endpoint: text } : tcpAddressOf(text, endpoints.length === 1, key, brokerKey);
    if (!addresses.some(({ endpoint }) => endpoint === address.endpoint)) addresses.push(address);
  }
  return addresses;
}

function tcpAddressOf(endpoint, only, key, brokerKey) {
  let text, hasKey;
  [endpoint, hasKey, text] = /^([^#]*)(#?)([^]*)$/.exec(endpoint).slice(1);
  let source = `the key in ${endpoint}`;
  if (!hasKey) [source, text] = setBy('brokerKey', brokerKey, 'BACKBONE_BROKER_KEY');
  else if (only && brokerKey && String(brokerKey) !== text) {
    throw new UsageError(`brokerKey is another key than that in ${endpoint}`);
  }
  const [ownSource, file] = setBy('key', key, 'BACKBONE_KEY');
  const own = file ? readSecretKey(ownSource, file) : undefined;
  if (text || hasKey) return { endpoint, keys: new Keys(parsePublicKey(source, String(text)), own) };
  if (own) throw new UsageError(`${ownSource} needs brokerKey, the public key of the broker`);
  return { endpoint };
}

function joinEndpoints(addresses, separator = ' ') {
  return addresses.map(({ endpoint }) => endpoint).join(separator);
}

/** Returns an option, or else an environment variable: its name and its value. */
function setBy(name, value, variable) {
  return value ? [name, value] : [variable, process.env[variable]];
}

/** The keys for connections to a broker. As an object of this class it does not show the secret key. */
class Keys {
  #broker;
  #own; // undefined for a new key that nobody knows

  constructor(broker, own) {
    if (!capability.curve) throw new BackboneError('this libzmq has no CURVE, which keys need', 69);
    this.#broker = broker;
    this.#own = own;
  }

  /** Returns what is the same in another thread. */
  plain() {
    return [this.#broker, this.#own];
  }

  get hasOwn() {
    return Boolean(this.#own);
  }

  /** Returns the options of a socket. */
  options() {
    const { publicKey, secretKey } = this.#own
      ? { publicKey: z85Encode(publicKeyOf(this.#own)), secretKey: z85Encode(this.#own) }
      : curveKeyPair();
    return { curveServerKey: z85Encode(this.#broker), curvePublicKey: publicKey, curveSecretKey: secretKey };
  }
}

/** Returns the public key of a secret one. CURVE's keys are those of X25519, which Node.js reads as PKCS #8. */
function publicKeyOf(secret) {
  const key = Buffer.concat([Buffer.from('302e020100300506032b656e04220420', 'hex'), secret]);
  const pair = crypto.createPublicKey(crypto.createPrivateKey({ key, format: 'der', type: 'pkcs8' }));
  return pair.export({ format: 'der', type: 'spki' }).subarray(-32);
}

const Z85 = '0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#';

/** Returns bytes, of which there are a multiple of four, as text (RFC 32). */
function z85Encode(bytes) {
  let text = '';
  for (let at = 0; at < bytes.length; at += 4) {
    const value = bytes.readUInt32BE(at);
    for (const power of [4, 3, 2, 1, 0]) text += Z85[Math.floor(value / 85 ** power) % 85];
  }
  return text;
}

/** The inverse of z85Encode. Returns undefined for text that is not Z85. */
function z85Decode(text) {
  const bytes = Buffer.alloc(text.length / 5 * 4);
  for (let group = 0; group < text.length / 5; group++) {
    const digits = [...text.slice(5 * group, 5 * group + 5)].map(digit => Z85.indexOf(digit));
    const value = digits.reduce((sum, digit) => sum * 85 + digit, 0);
    if (digits.includes(-1) || value >= 2 ** 32) return undefined;
    bytes.writeUInt32BE(value, 4 * group);
  }
  return bytes;
}

/** Returns the bytes of a public key: in our form, or in the Z85 of other tools. */
function parsePublicKey(source, text) {
  const ours = /^bbpub-([0-9a-fA-F]{64})$/.exec(text);
  if (ours) return Buffer.from(ours[1], 'hex');
  if (text.includes(SECRET_PREFIX)) {
    throw new UsageError(`${source}: that is a secret key, which nobody else may see; a public key is wanted`);
  }
  const key = text.length === 40 && !text.startsWith(PUBLIC_PREFIX) ? z85Decode(text) : undefined;
  if (key) return key;
  const shown = inspect(text.slice(0, 80));
  throw new UsageError(`${source}: ${shown} is not a public key (${PUBLIC_PREFIX} and 64 hexadecimal digits)`);
}

/** Returns the bytes of the secret key in a file that nobody else may read: its only line that is no comment. */
function readSecretKey(source, file) {
  if (String(file).includes(SECRET_PREFIX) && !fs.existsSync(file)) {
    throw new UsageError(`${source}: that is a secret key; the name of the file that has it is wanted`);
  }
  let stat, content;
  try {
    const descriptor = fs.openSync(file);
    try {
      stat = fs.fstatSync(descriptor);
      content = fs.readFileSync(descriptor, 'latin1');
    } finally {
      fs.closeSync(descriptor);
    }
  } catch (cause) {
    throw new UsageError(`${source}: ${cause.message}`, { cause });
  }
  const keys = content.split('\n').map(line => line.trim()).filter(line => line && !line.startsWith('#'));
  const key = /^bbsec-([0-9a-fA-F]{64})$/.exec(keys[0]);
  let why;
  if (!keys.length) why = 'the file has no secret key';
  else if (keys[0].startsWith(PUBLIC_PREFIX)) why = 'that is a public key; a secret key is wanted';
  else if (keys.length > 1 || !key) why = `not a file with one secret key (${SECRET_PREFIX} and 64 hexadecimal digits)`;
  if (why) throw new UsageError(`${source}: ${file}: ${why}`);
  // A file of somebody else, as a credential of systemd is, may be there for the group of this process.
  const forbidden = stat.uid === process.geteuid() ? 0o077 : 0o007;
  if (stat.isFile() && stat.mode & forbidden) {
    const mode = (stat.mode & 0o777).toString(8).padStart(4, '0');
    throw new UsageError(`${source}: ${file} has mode ${mode}: others may read it`);
  }
  return Buffer.from(key[1], 'hex');
}

/** Returns a socket that connects to an endpoint. watch is called with the socket before it connects. */
function dealer(endpoint, keys, tool, watch = () => {}) {
  let socket;
  try {
    socket = new Dealer({
      // Unique and printable. It names the tool, the host and the process.
      routingId: `${tool}.${os.hostname().slice(0, 200)}.${process.pid}.${crypto.randomBytes(8).toString('hex')}`,
      linger: 0,
      reconnectInterval: 20,
      reconnectMaxInterval: 1000,
      ipv6: endpoint.includes('['),
      ...(keys && keys.options()),
    });
    watch(socket);
  } catch (cause) {
    throw new BackboneError(`${endpoint}: ${cause.message}`, 74, { cause }); // such as too many open files
  }
  try {
    socket.connect(endpoint);
  } catch (cause) {
    socket.close();
    throw new UsageError(`connect ${endpoint}: ${cause.message}`, { cause });
  }
  return socket;
}

/** Sends a message. */
const send = (socket, message) => again(socket, () => socket.send(message));

/** Resolves to the next message. */
const receive = socket => again(socket, () => socket.receive());

/** Yields the messages of a socket until it is closed. */
async function* messagesOf(socket) {
  while (!socket.closed) {
    const message = await receive(socket).catch(error => { if (!socket.closed) throw error; });
    if (message) yield message;
  }
}

/** Repeats an operation of a socket if zeromq rejects it because the connection for it has just broken. */
async function again(socket, operation) {
  for (;;) {
    try {
      return await operation();
    } catch (error) {
      if (error.code !== 'EAGAIN' || socket.closed) throw error;
    }
  }
}

/**
 * Returns a promise that rejects with the reason if the broker takes no connection of a socket because of
 * the keys. Call it before the socket connects.
 */
function refusalOf({ events }, endpoint, keys) {
  const refusal = new Promise((_, reject) => {
    const refuse = (why, Kind = NotAllowed) => reject(new Kind(`${why}: ${endpoint}`));
    const mismatch = () => (keys ? refuse('the broker takes no keys', ProtocolError) : refuse('the broker wants a key'));
    let failed = 0; // handshakes in a row
    let suspicions = 0; // times in a row that they failed while the broker kept another connection
    events.on('handshake', () => { failed = suspicions = 0; });
    events.on('handshake:error:auth', ({ error }) => {
      failed++;
      if (error.status !== 400) return;
      if (!keys) refuse('the broker refuses the connection');
      else refuse(keys.hasOwn ? 'the broker does not know this key' : 'the broker admits only keys that it knows');
    });
    events.on('handshake:error:protocol', ({ error }) => {
      failed++;
      if (error.code === 'ERR_ZMTP_MECHANISM_MISMATCH') mismatch();
    });
    events.on('handshake:error:other', async () => {
      if (++failed < MAX_FAILED) return;
      failed = 0;
      const { theirs, kept } = await mechanismOf(endpoint, keys);
      suspicions = kept ? suspicions + 1 : 0;
      if (theirs === (keys ? 'NULL' : 'CURVE')) mismatch();
      else if (theirs === 'CURVE' && suspicions >= MAX_SUSPICIONS) refuse('the broker has another key than expected');
    });
  });
  refusal.catch(() => {});
  return refusal;
}

/**
 * Resolves to CURVE if the broker at an endpoint takes keys, to NULL if it takes none, and to nothing if that
 * is unknown. If keys are the matter, ZeroMQ may close a connection before it has said so. To a peer that
 * stops in the middle of its greeting (ZMTP 3.0, RFC 23), it sends all of its own. With keys, it also tells
 * whether a broker that takes keys keeps the connection, as one that has room does.
 */
function mechanismOf(endpoint, keys) {
  return new Promise(resolve => {
    const [, host, port] = /^tcp:\/\/\[?(.*?)\]?:(\d+)$/.exec(endpoint) || [];
    if (!port || port > 65535) {
      resolve({});
      return;
    }
    let greeting = Buffer.alloc(0), kept = false;
    const mechanism = () => greeting.toString('latin1', 12, 32).replace(/\0/g, '');
    const connection = net.connect({ host, port, timeout: 1000 });
    connection.write(Buffer.from('ff00000000000000017f03', 'hex'));
    connection.on('data', data => {
      greeting = Buffer.concat([greeting, data]);
      if (greeting.length < 64) return;
      if (keys && mechanism() === 'CURVE') connection.setTimeout(100);
      else connection.destroy();
    });
    connection.on('timeout', () => {
      kept = greeting.length >= 64;
      connection.destroy();
    });
    connection.on('end', () => connection.destroy()).on('error', () => {});
    connection.on('close', () => resolve({ theirs: mechanism(), kept }));
  });
}

/** Returns a timeout in milliseconds, or 0 for none. */
function millisecondsOf(timeout) {
  const milliseconds = timeout === undefined || timeout === null ? DEFAULT_TIMEOUT : Number(timeout);
  if (Number.isNaN(milliseconds)) {
    throw new UsageError(`a timeout must be a number of milliseconds, not ${inspect(timeout)}`);
  }
  return milliseconds > 0 && milliseconds < MAX_TIMEOUT ? milliseconds : 0;
}

/** A request and its reply, as the frames that a REQ socket sends and receives. */
class BackboneClientMessage {
  constructor(service, message, { encoding = 'utf8' } = {}) {
    this.service = String(bytesOf(service));
    this.message = message;
    this.encoding = encoding;
    this.reply = undefined;
  }

  serialize() {
    return [CLIENT, this.service, ...framesOf(this.message)];
  }

  /**
   * Returns the frames of the reply; by default, a single frame without an array. Throws a
   * StatusError if the reply reports a failure.
   */
  parseReply(raw, { simply_short_reply = true } = {}) {
    let [protocol, service, ...body] = raw.map(frame => Buffer.from(frame));
    if (String(protocol) !== CLIENT || String(service) !== this.service) {
      throw new ProtocolError(`bad reply: ${raw.slice(0, 4).map(frame => JSON.stringify(String(frame)))}`);
    }
    const status = statusOf(body);
    if (status && status.status !== 0) throw status;
    if (status) body = [status.stdout];
    body = body.map(frame => decode(frame, this.encoding));
    this.reply = simply_short_reply && body.length === 1 ? body[0] : body;
    return this.reply;
  }

  parseResponse(raw, options) {
    return this.parseReply(raw, options);
  }

  getReply() {
    return this.reply;
  }
}

/** Returns the status reply in body as a StatusError, or undefined if body is data. */
function statusOf(body) {
  if (body.length === 2 && String(body[0]) === 'Error') {
    return new StatusError(1, Buffer.alloc(0), Buffer.concat([body[1], Buffer.from('\n')]));
  }
  const match = body.length === 3 && /^exit status (\d+)$/.exec(String(body[2]));
  return match && match[1] < 256 ? new StatusError(Number(match[1]), body[0], body[1]) : undefined;
}

// Requests that have a connection, idle connections, and the functions that let waiting requests proceed.
let active = 0;
const idle = new Set();
const waiting = [];

/** Resolves when a request may have a connection, in the order of the calls. Rejects when failure does. */
async function takeTurn(failure) {
  if (active < MAX_CONNECTIONS) {
    active++;
    return;
  }
  let proceed;
  const turn = new Promise(resolve => { proceed = resolve; });
  waiting.push(proceed);
  try {
    await Promise.race([turn, failure]);
  } catch (error) {
    const place = waiting.indexOf(proceed);
    if (place >= 0) waiting.splice(place, 1);
    else giveTurnBack();
    throw error;
  }
}

function giveTurnBack() {
  if (waiting.length) waiting.shift()();
  else active--;
}

/** A socket for one request at a time, and the state of its connection. */
class Connection {
  /** Opens a connection. It may take the place of idle ones, of any client. */
  constructor(client, place = 0) {
    if (active + idle.size > MAX_CONNECTIONS) idle.forEach(connection => connection.close());
    const { endpoint, keys } = client._brokers[place];
    Object.assign(this, { client, place, endpoint });
    this.connected = this.lost = false;
    this.dead = false; // lost or refused
    this.retried = false; // the last attempt to connect has failed
    this.names = new Set(); // of services that the broker had, if it is one of several
    this.partials = undefined; // whether the broker passes on partial replies, if that is known
    this.credit = false; // whether it also takes mmi.credit
    this.unanswered = 0; // questions and grants of a stream that may still be answered
    this.failure = undefined; // of the request that uses it
    this.changed = () => {}; // is called after a change of the above, or of refusal
    this.socket = dealer(endpoint, keys, 'brequest', socket => {
      const { events } = socket;
      this.refused = refusalOf(socket, endpoint, keys);
      this.refused.catch(error => { this.dead = true; this.refusal = error; this.changed(); });
      this.ready = new Promise(resolve => {
        events.on('handshake', () => { this.connected = true; this.retried = false; resolve(); this.changed(); });
      });
      events.on('disconnect', () => {
        if (this.connected) { this.dead = this.lost = true; this.changed(); }
      });
      events.on('connect:retry', () => { this.retried = !this.connected; this.changed(); });
    });
  }

  /** Begins a request, which fails when failure does. */
  begin(failure) {
    this.failure = undefined;
    failure.catch(error => { this.failure = error; this.changed(); });
  }

  /**
   * Resolves as a promise does. Rejects if the request fails before. In contrast to Promise.race, it leaves
   * nothing at promises that last, of which a long stream would leave a lot.
   */
  until(promise) {
    let timer;
    return new Promise((resolve, reject) => {
      this.changed = () => {
        const lost = () => reject(new ConnectionLost(`lost the broker at ${this.endpoint} before its reply`));
        if (this.failure) reject(this.failure);
        // A broker that stops may send a reply just before it closes the connection. zeromq may
        // deliver the reply after the disconnect event.
        else if (this.lost) timer = timer || setTimeout(lost, 100);
        else if (this.refusal) reject(this.refusal);
      };
      promise.then(resolve, reject);
      this.changed();
    }).finally(() => {
      clearTimeout(timer);
      this.changed = () => {};
    });
  }

  /** Sends a message in the protocol that is its first frame. */
  send(protocol, ...frames) {
    const sent = send(this.socket, protocol === CLIENT ? ['', CLIENT, ...frames] : [CLIENT02, CLIENT_REQUEST, ...frames]);
    sent.catch(() => {}); // it rejects when the socket is closed
    return this.until(sent);
  }

  /** Resolves to the next message, or to nothing after patience, if it is given. */
  async receive(patience) {
    if (!this.arrival) {
      this.arrival = receive(this.socket);
      this.arrival.catch(() => {});
    }
    let timer;
    const over = patience && new Promise(resolve => { timer = setTimeout(resolve, patience); });
    try {
      const message = await this.until(over ? Promise.race([this.arrival, over]) : this.arrival);
      if (message) this.arrival = undefined;
      return message;
    } finally {
      clearTimeout(timer);
    }
  }

  /** Sends a request and resolves to the frames of the reply. Rejects when failure does. */
  async ask(frames, failure) {
    this.begin(failure);
    await this.send(...frames);
    const reply = await this.receive();
    if (reply.length < 3 || reply[0].length > 0) throw new ProtocolError('bad reply: no empty first frame, or too few frames');
    return reply.slice(1);
  }

  /** Asks whether the broker passes on partial replies, unless that is known. */
  async learnPartials() {
    for (const protocol of [CLIENT, CLIENT02]) {
      if (this.partials !== undefined) return;
      await this.send(protocol, 'mmi.service', 'mmi.credit');
      this.unanswered++;
      await this.until(this.ready);
      const answer = await this.receive(PATIENCE);
      if (!answer) continue;
      this.unanswered--;
      this.credit = String(answer[answer.length - 1]) === '200';
      this.partials = this.credit || answer.slice(0, 2).map(String).includes(CLIENT02);
    }
    if (this.partials === undefined) this.partials = false;
  }

  /** Cancels the request. Waits for the reply, which may come after parts and shows that mmi.cancel was sent. */
  async cancel() {
    this.failure = undefined;
    let timer;
    const over = new Promise(resolve => { timer = setTimeout(resolve, CANCEL_PATIENCE); });
    await this.send(this.partials ? CLIENT02 : CLIENT, 'mmi.cancel', '');
    const answered = async () => {
      while (!(await this.receive()).slice(0, 4).map(String).includes('mmi.cancel'));
    };
    await Promise.race([answered().catch(() => {}), over]);
    clearTimeout(timer);
  }

  /** Keeps the connection for the next request of its client, and closes it after IDLE_PATIENCE. */
  rest() {
    if (this.unanswered) {
      this.close();
      return;
    }
    idle.add(this);
    clearTimeout(this.idleTimer);
    this.idleTimer = setTimeout(() => this.close(), IDLE_PATIENCE);
  }

  wake() {
    idle.delete(this);
    clearTimeout(this.idleTimer);
  }

  close() {
    this.wake();
    this.socket.close();
  }
}

/** The reply to a stream's request: what its messages mean, and the credit that the broker gets for them. */
class PartialReply {
  constructor(connection, name) {
    Object.assign(this, { connection, name });
    this.protocol = connection.partials ? CLIENT02 : CLIENT;
    this.grants = connection.credit; // the broker awaits them
    this.owed = 0; // parts that were taken and not granted
    this.asked = false; // a grant is unanswered
    this.ended = false;
    this.failure = undefined; // a StatusError, once it has ended
    this.stderr = Buffer.alloc(0); // the last of it
  }

  async request(body) {
    await this.connection.send(this.protocol, this.name, ...body);
    if (this.grants) await this.sendGrant();
  }

  /** Grants a part for one that was taken. Only one grant is on its way at a time. */
  async grant() {
    this.owed++;
    if (this.grants && !this.asked && !this.ended) await this.sendGrant();
  }

  async sendGrant() {
    const owed = String(this.owed);
    this.owed = 0;
    this.asked = true;
    this.connection.unanswered++;
    await this.connection.send(CLIENT02, 'mmi.credit', owed);
  }

  /** Resolves to the output, as frames, and the standard error in a part, or to nothing for another message. */
  async parse(frames) {
    const { kind, body } = await this.cut(frames);
    if (!kind) return undefined;
    this.ended = kind === CLIENT_FINAL;
    const status = statusOf(body);
    const { output, stderr } = status ? { output: [status.stdout], stderr: status.stderr } : { output: body, stderr: Buffer.alloc(0) };
    if (stderr.length) this.stderr = Buffer.concat([this.stderr, stderr]).subarray(-STDERR_KEPT);
    if (this.ended && status && status.status !== 0) this.failure = new StatusError(status.status, Buffer.alloc(0), this.stderr);
    return { output, stderr };
  }

  /** Resolves to the kind and the body of a message, or to neither for the answer to a question or a grant. */
  async cut(frames) {
    if (frames[0].length === 0) frames = frames.slice(1);
    const [protocol, second, third] = frames.slice(0, 3).map(String);
    if (protocol === CLIENT && this.protocol === CLIENT && second === this.name) return { kind: CLIENT_FINAL, body: frames.slice(2) };
    const ours = protocol === CLIENT02 && this.protocol === CLIENT02;
    if (ours && third === 'mmi.credit') {
      await this.answered(frames.slice(3).map(String));
      return {};
    }
    if (ours && (second === CLIENT_PARTIAL || second === CLIENT_FINAL)) {
      return { kind: second, body: frames.slice(third === this.name ? 3 : 2) }; // some brokers leave the name out
    }
    if (protocol === CLIENT && second === 'mmi.service' || protocol === CLIENT02 && !ours) {
      this.connection.unanswered--; // it comes late
      return {};
    }
    throw new ProtocolError(`bad reply: ${frames.slice(0, 4).map(frame => JSON.stringify(String(frame)))}`);
  }

  async answered(answer) {
    this.connection.unanswered--;
    this.asked = false;
    this.grants = this.grants && answer.length === 1 && answer[0] === '200';
    if (this.grants && this.owed) await this.sendGrant();
  }
}

const SERVES = 'serves', VACANT = 'vacant', FAILED = 'failed';

/** One of several brokers that may get a request: the connection, and whether the broker has the service. */
class Attempt {
  /** changed is called after a change of the verdict. */
  constructor(client, place, name, changed) {
    Object.assign(this, { place, name, changed, since: Date.now() });
    this.verdict = undefined; // or SERVES, VACANT or FAILED; the last one may change
    this.asked = false;
    this.use(client._takeIdle(idle => idle.place === place) || new Connection(client, place));
  }

  /** Connects again after a loss. Its socket would do that too, but a late answer might confuse. */
  reopen() {
    const { client, place } = this.connection;
    this.connection.close();
    this.asked = false;
    try {
      this.use(new Connection(client, place));
    } catch { // such as too many open files
      this.reopenLater();
    }
  }

  reopenLater() {
    this.reopening = setTimeout(() => this.reopen(), PATIENCE);
  }

  use(connection) {
    this.connection = connection;
    connection.changed = () => this.update();
    this.update();
  }

  /** Updates the verdict. Asks the broker as soon as the connection stands. */
  update() {
    const { lost, connected, refusal, retried } = this.connection;
    if (lost && this.verdict !== FAILED) {
      this.since = Date.now();
      this.verdict = FAILED;
      this.reopenLater();
    } else if (lost || refusal || retried) {
      this.verdict = FAILED;
    } else if (connected && !this.asked) {
      this.asked = true;
      if (this.verdict) this.since = Date.now();
      this.verdict = this.name.startsWith('mmi.') ? SERVES : undefined;
      if (!this.verdict) this.ask(this.connection).catch(() => {}); // it rejects when the socket is closed
    }
    this.changed();
  }

  async ask({ socket }) {
    await send(socket, ['', CLIENT, 'mmi.service', this.name]);
    const answer = (await receive(socket)).map(String);
    if (socket !== this.connection.socket || this.connection.lost) return;
    this.verdict = answer.length === 4 && answer[3] === '404' ? VACANT : SERVES;
    this.changed();
  }

  /** Ends the attempt. The connection is left to the caller. */
  end() {
    clearTimeout(this.reopening);
    this.connection.changed = () => {};
    return this.connection;
  }
}

/**
 * Sends requests to services. Each concurrent request has its own connection. The clients of a
 * process have MAX_CONNECTIONS of them; more requests wait for their turn. Of several brokers,
 * the first that can be reached and has the service gets the request.
 */
class BackboneClient {
  /**
   * @param {string} [host]
   * @param {number|string} [port]
   * @param {{encoding?: string|null} & Address} [options]
   */
  constructor(host, port, { encoding = 'utf8', ...address } = {}) {
    this.host = host;
    this.port = port;
    this._brokers = addressesOf(host, port, address);
    this.endpoint = joinEndpoints(this._brokers);
    this.encoding = encoding;
    this._first = 0; // the broker to begin with
    this._searches = 0;
  }

  getEndpoint() {
    return this.endpoint;
  }

  /** Resolves when the client is connected. This is optional: send connects as well. */
  async connect() {
    if (this._brokers.length > 1) {
      (await this._search('mmi.', {}, new Promise(() => {}))).rest();
      return this;
    }
    const connection = new Connection(this);
    idle.add(connection);
    try {
      await Promise.race([connection.ready, connection.refused]);
    } catch (error) {
      connection.close();
      throw error;
    }
    if (idle.has(connection)) connection.rest();
    return this;
  }

  /** Closes the connections that no request uses. send opens new ones, to the first broker if it can. */
  async disconnect() {
    this._first = 0;
    for (const connection of idle) {
      if (connection.client === this) connection.close();
    }
    return this;
  }

  close() {
    return this.disconnect();
  }

  /**
   * Resolves to the reply of a service. Waits for a broker that is not running yet. timeout
   * is in milliseconds; 0 or less means no timeout. An abort of signal rejects with its reason.
   * @param {string} service
   * @param {Message} [message]
   * @param {number|null} [timeout]
   * @param {{signal?: AbortSignal}} [options]
   * @returns {Promise<any>} a Frame or an array of them
   */
  async send(service, message, timeout, { signal } = {}) {
    const request = new BackboneClientMessage(service, message, { encoding: this.encoding });
    const frames = request.serialize();
    const guard = this._guard(timeout, signal);
    const connection = await this._begin(request.service, guard);
    let keep = false;
    try {
      const result = request.parseReply(await connection.ask(frames, guard.failure));
      keep = true;
      return result;
    } catch (error) {
      keep = error instanceof StatusError;
      throw error;
    } finally {
      await this._finish(connection, request.service, guard, keep);
    }
  }

  /**
   * Iterates over the output of a service, as Buffers, in parts as they come. The first step sends the request.
   * timeout is the longest silence in milliseconds; 0 or less means none. onStderr is called with each part of
   * standard error. A failure throws a StatusError after the last part. return(), and the end of a loop by break or
   * an exception, take the request back.
   * @param {string} service
   * @param {Message} [message]
   * @param {number|null} [timeout]
   * @param {{signal?: AbortSignal, onStderr?: (part: Buffer) => void}} [options]
   * @returns {AsyncGenerator<Buffer, void, void>}
   */
  async *stream(service, message, timeout, { signal, onStderr = () => {} } = {}) {
    const [, name, ...body] = new BackboneClientMessage(service, message).serialize();
    const guard = this._guard(timeout, signal);
    const connection = await this._begin(name, guard);
    let keep = false;
    try {
      connection.begin(guard.failure);
      await connection.learnPartials();
      const reply = new PartialReply(connection, name);
      await reply.request(body);
      guard.restart();
      while (!reply.ended) {
        const part = await reply.parse(await connection.receive());
        if (!part) continue;
        guard.pause();
        if (part.stderr.length) onStderr(part.stderr);
        for (const frame of part.output) if (frame.length) yield frame;
        await reply.grant();
        guard.restart();
      }
      if (reply.failure) throw reply.failure;
      keep = true;
    } catch (error) {
      keep = error instanceof StatusError;
      throw error;
    } finally {
      await this._finish(connection, name, guard, keep);
    }
  }

  /** Returns what ends a request too early: failure rejects after the timeout, and when signal aborts. */
  _guard(timeout, signal) {
    timeout = millisecondsOf(timeout);
    if (signal && signal.aborted) throw signal.reason;
    const guard = { progress: {} }; // the connection, or the attempts to get one
    let timer, expire, abort;
    guard.failure = new Promise((_, reject) => {
      expire = () => reject(this._timedOut(guard.progress, timeout));
      abort = () => reject(signal.reason);
    });
    guard.failure.catch(() => {});
    guard.pause = () => clearTimeout(timer);
    guard.restart = () => {
      clearTimeout(timer);
      if (timeout) timer = setTimeout(expire, timeout);
    };
    guard.end = () => {
      clearTimeout(timer);
      if (signal) signal.removeEventListener('abort', abort);
    };
    if (signal) signal.addEventListener('abort', abort);
    guard.restart();
    return guard;
  }

  /** Resolves to a connection for a request, which ends with _finish. */
  async _begin(name, guard) {
    let turn = false;
    try {
      await takeTurn(guard.failure);
      turn = true;
      guard.progress.connection = await this._acquire(name, guard.progress, guard.failure);
      return guard.progress.connection;
    } catch (error) {
      guard.end();
      if (turn) giveTurnBack();
      throw error;
    }
  }

  /** Keeps the connection for the next request, or takes the request back and closes the connection. */
  async _finish(connection, name, guard, keep) {
    guard.end();
    if (keep) {
      connection.rest();
    } else {
      if (connection.lost) this._leave(connection.place);
      if (connection.connected && !connection.lost && !name.startsWith('mmi.')) await connection.cancel().catch(() => {});
      connection.close(); // so that a late reply is not taken for the reply to the next request
    }
    giveTurnBack();
  }

  _timedOut({ connection, attempts }, timeout) {
    if (!connection && !attempts) {
      return new RequestTimeout(`not sent within ${timeout}ms: ${MAX_CONNECTIONS} other requests are in progress`);
    }
    const standing = connection ? [connection] : attempts.map(attempt => attempt.connection);
    const endpoints = joinEndpoints(standing.filter(({ connected, lost }) => connected && !lost), ', ');
    if (endpoints) return new RequestTimeout(`no reply from ${endpoints} within ${timeout}ms`);
    return new NoBroker(`no broker at ${joinEndpoints(this._brokers, ', ')} within ${timeout}ms`);
  }

  /** Returns an idle connection that fits and still stands, if any. */
  _takeIdle(fits) {
    for (const connection of idle) {
      if (connection.client !== this || !fits(connection)) continue;
      connection.wake();
      if (!connection.dead) return connection;
      connection.close();
    }
    return undefined;
  }

  /** Resolves to a connection for a request: an idle one, or a new one. Rejects when failure does. */
  async _acquire(name, progress, failure) {
    if (this._brokers.length === 1) return this._takeIdle(() => true) || new Connection(this);
    const connection = this._takeIdle(({ names }) => names.has(name)) || await this._search(name, progress, failure);
    connection.names.add(name);
    return connection;
  }

  /** Resolves to a connection to the one of several brokers that is to get a request. Closes all others. */
  async _search(name, progress, failure) {
    const attempts = progress.attempts = [];
    let wake = () => {};
    let chosen, searching;
    try {
      for (;;) {
        const woken = new Promise(resolve => { wake = resolve; });
        chosen = this._choice(attempts);
        if (chosen) {
          // Begin with the first that has answered, not with one that is away.
          this._first = attempts.find(({ verdict }) => verdict === SERVES || verdict === VACANT).place;
          return chosen.connection;
        }
        const now = Date.now();
        const last = attempts[attempts.length - 1];
        let due = Math.max(0, ...attempts.map(({ since }) => since)) + PATIENCE;
        if (attempts.length < this._brokers.length && (!last || last.verdict || now >= last.since + PATIENCE)) {
          if (last && !searching && this._searches < MAX_SEARCHES) {
            searching = true;
            this._searches++;
          }
          if (searching || !last) {
            attempts.push(new Attempt(this, this._nextPlace(attempts), name, () => wake()));
            continue;
          }
          due = now + PATIENCE / 10;
        }
        const timer = setTimeout(wake, due > now ? due - now : PATIENCE);
        try {
          await Promise.race([woken, failure]);
        } finally {
          clearTimeout(timer);
        }
      }
    } finally {
      if (searching) this._searches--;
      for (const attempt of attempts) {
        const connection = attempt.end();
        if (attempt !== chosen) connection.close();
      }
    }
  }

  /** Returns the next broker that is not tried yet, from the first one on, round and round. */
  _nextPlace(attempts) {
    const places = this._brokers.map((_, step) => (this._first + step) % this._brokers.length);
    return places.find(place => !attempts.some(attempt => attempt.place === place));
  }

  /** Returns the attempt that gets the request, or undefined as long as that is open. Throws if all are refused. */
  _choice(attempts) {
    const byVerdict = wanted => attempts.filter(({ verdict }) => verdict === wanted);
    const serving = byVerdict(SERVES), vacant = byVerdict(VACANT), pending = byVerdict(undefined);
    if (serving.length || attempts.length < this._brokers.length) return serving[0];
    if (vacant.length && pending.every(({ since }) => Date.now() >= since + FARTHEST)) return vacant[0];
    if (attempts.every(({ connection }) => connection.refusal)) {
      throw attempts.reduce((a, b) => (a.place < b.place ? a : b)).connection.refusal;
    }
    return undefined;
  }

  /** Lets the next request begin with the broker after one that is lost. */
  _leave(place) {
    this._first = (place + 1) % this._brokers.length;
    for (const connection of idle) {
      if (connection.client === this) connection.names.clear(); // of all, so that the order counts
    }
  }
}

const NO_REPLY = 'on_request ended without a reply; it must call reply, or return text, bytes, or an array of them';

/** Returns whether a value that on_request returns is a reply, and not, say, the timer of a later one. */
function isMessage(value) {
  return typeof value === 'string' || ArrayBuffer.isView(value) || Array.isArray(value);
}

/** Returns whether a value that on_request returns is a generator or another iterator, and not, say, a file to read. */
function isIterator(value) {
  return Boolean(value) && typeof value.next === 'function' && Boolean(value[Symbol.asyncIterator] || value[Symbol.iterator]);
}

/** Returns the reply for an exception in on_request. */
function failureOf(error) {
  if (error instanceof StatusError) {
    const valid = Number.isInteger(error.status) && error.status >= 0 && error.status < 256;
    try {
      return framesOf([error.stdout, error.stderr, `exit status ${valid ? error.status : 1}`]);
    } catch (worse) {
      error = worse;
    }
  }
  return framesOf(['', `${error && error.stack ? `${error.name}: ${error.message}` : format('%s', error)}\n`, 'exit status 1']);
}

/** Returns text as it is, or quoted if it would break a line or hide something. */
function printable(text) {
  return /\p{C}/u.test(text) ? inspect(text) : text;
}

/** Collects garbage, which an idle process does not do by itself. */
function collect() {
  v8.setFlagsFromString('--expose-gc');
  vm.runInNewContext('gc')();
}

/**
 * Serves requests for a name. Calls on_request(message, reply) for one request at a time.
 * on_request calls reply, now or later, or returns the reply or a promise of it: a string, a
 * Buffer, or an array of them. The client gets a failure if on_request throws an exception, if
 * its promise rejects, or if it ends and leaves nothing that could call reply. on_request may
 * block, because another thread sends the heartbeats. With several brokers it serves all of them. A
 * request that comes while on_request has one of another broker is handed back.
 *
 * If on_request is a generator or an async one, or returns such an iterator, what it yields goes to the
 * client as it comes, if the client takes a stream. A generator waits at yield for a client that is slow. If
 * nobody awaits the reply any more, reply.signal is aborted, and the generator is closed at its next yield.
 */
class BackboneService {
  /**
   * @param {string} service
   * @param {(message: any[], reply: ((message?: Message) => void) & {signal: AbortSignal}) => any} on_request
   * @param {Options & {log?: (text: string) => void}} [options]
   */
  constructor(service, on_request, { host, port, encoding = 'utf8', log, ...address } = {}) {
    this.service = service;
    this.on_request = on_request;
    this._brokers = addressesOf(host, port, address);
    this.endpoint = joinEndpoints(this._brokers);
    this.encoding = encoding;
    this.log = log || (text => console.error(`${service}: ${text}`));
    this._forgotten = new FinalizationRegistry(token => this._refuse(token, NO_REPLY)); // reply functions
  }

  getEndpoint() {
    return this.endpoint;
  }

  /** Serves in the background. Registers as soon as the broker can be reached. */
  connect() {
    // It fails here, and not in the thread, if an endpoint is bad.
    for (const { endpoint, keys } of this._brokers) dealer(endpoint, keys, 'bservice').close();
    this._thread = new Worker(__filename, {
      workerData: {
        backboneService: this.service,
        brokers: this._brokers.map(({ endpoint, keys }) => ({ endpoint, keys: keys && keys.plain() })),
      },
    });
    this._thread.on('message', ({ log, token, body, credit, over }) => {
      if (log) this.log(log);
      else if (body) this._serve(new ServedRequest(token, credit), body);
      else if (over) this._end(token);
      else if (this._awaits(token)) this._request.grant(credit);
    });
    this._ended = new Promise((resolve, reject) => this._thread.on('exit', resolve).on('error', reject));
    return this;
  }

  /**
   * Serves. Resolves after disconnect. SIGTERM and SIGINT (Ctrl-C) call disconnect, and a second
   * one ends the process at once. A signal that has a listener of the program is left to it.
   */
  async start() {
    const signals = ['SIGTERM', 'SIGINT'].filter(signal => process.listenerCount(signal) === 0);
    const restore = () => signals.forEach(signal => process.off(signal, stop));
    const stop = () => {
      restore();
      this.disconnect();
    };
    this.connect();
    signals.forEach(signal => process.on(signal, stop));
    try {
      await this._ended;
    } finally {
      restore();
    }
  }

  /** Accepts no more requests, and sends DISCONNECT after the reply to the current one. Resolves then. */
  disconnect() {
    if (this._thread) this._thread.postMessage({ stop: true });
    return this._ended;
  }

  close() {
    return this.disconnect();
  }

  /** Calls on_request for a request. */
  async _serve(request, body) {
    const { token } = request;
    this._request = request;
    const reply = message => {
      try {
        this._answer(token, framesOf(message));
      } catch (error) {
        this._refuse(token, error.message);
      }
    };
    reply.signal = request.over.signal;
    this._forgotten.register(reply, token, request);
    try {
      const result = this.on_request(body.map(frame => decode(Buffer.from(frame), this.encoding)), reply);
      if (this._awaits(token)) this._collectLater(...COLLECT_PAUSES);
      const returned = await result;
      if (isMessage(returned)) reply(returned);
      else if (isIterator(returned)) await this._sendParts(request, returned);
    } catch (error) {
      this._answer(token, failureOf(error));
    }
  }

  /** Sends the parts of an iterator, or collects them for a client that takes only one reply. */
  async _sendParts(request, parts) {
    const { token, takesParts, over: { signal } } = request;
    this._forgotten.unregister(request);
    if (this._awaits(token)) clearTimeout(this._collector);
    const collected = [];
    let size = 0;
    const goesOn = () => this._awaits(token) && !signal.aborted;
    for await (const part of parts) {
      const data = Buffer.concat(framesOf(part));
      if (!takesParts) {
        collected.push(data);
        size += data.length;
        if (size > MAX_COLLECTED) {
          throw new BackboneError(`a reply of more than ${MAX_COLLECTED} bytes, to a client that takes no stream`);
        }
      }
      for (let start = 0; takesParts && goesOn() && start < data.length; start += PART_SIZE) {
        await request.takeCredit();
        if (!goesOn()) break;
        const piece = new Uint8Array(data.subarray(start, start + PART_SIZE)); // postMessage would copy all that a view is of
        this._thread.postMessage({ token, part: piece }, [piece.buffer]);
      }
      if (!goesOn()) break;
    }
    this._answer(token, [Buffer.concat(collected)]);
  }

  /** Returns whether a request is the current one and has no reply yet. */
  _awaits(token) {
    return Boolean(this._request) && token === this._request.token;
  }

  /** Sends the first reply to the current request. Ignores any other reply. */
  _answer(token, body) {
    if (!this._awaits(token)) return;
    const request = this._request;
    this._request = undefined;
    clearTimeout(this._collector);
    request.wake();
    this._thread.postMessage({ token, body });
  }

  _refuse(token, why) {
    if (!this._awaits(token)) return;
    this.log(why);
    this._answer(token, failureOf(new StatusError(1, '', `${this.service}: ${why}\n`)));
  }

  /** Tells on_request that nobody awaits the reply any more. */
  _end(token) {
    if (!this._awaits(token)) return;
    this._request.over.abort();
    this._request.wake();
  }

  /** Collects garbage until the reply is there: perhaps nothing but garbage refers to the reply function. */
  _collectLater(pause, longest) {
    this._collector = setTimeout(() => {
      collect();
      this._collectLater(Math.min(2 * pause, longest), longest);
    }, pause);
  }
}

/** A request in progress. credit is the number of parts that may be sent, or undefined if the client takes none. */
class ServedRequest {
  constructor(token, credit) {
    this.token = token;
    this.takesParts = credit !== undefined;
    this.credit = credit;
    this.over = new AbortController(); // aborts when nobody awaits the reply any more
    this.wake = () => {};
  }

  grant(number) {
    this.credit += number;
    if (this.credit > 0) this.wake();
  }

  /** Resolves when the next part may be sent, or when wake is called. */
  async takeCredit() {
    if (this.credit <= 0) await new Promise(resolve => { this.wake = resolve; });
    this.credit--;
  }
}

/** Runs the thread of a BackboneService: registers with each broker until it is told to stop. */
async function serveAll({ backboneService: service, brokers }) {
  const turns = new HandlerTurns();
  const registrations = brokers.map(({ endpoint, keys }) => new Registrations(service, {
    endpoint,
    keys: keys && new Keys(...keys.map(key => key && Buffer.from(key))),
    named: brokers.length > 1,
  }, turns));
  parentPort.on('message', message => registrations.forEach(registration => registration.tell(message)));
  await Promise.all(registrations.map(registration => registration.keep()));
  parentPort.close();
}

/** Lets one session at a time have on_request. Those that had to hand a request back get their turns in that order. */
class HandlerTurns {
  constructor() {
    this.user = undefined; // the session that has it, or for which it is reserved
    this.waiting = [];
  }

  /** Returns whether a session may call on_request now. It then has to release it. */
  take(session) {
    if (this.user && this.user !== session) return false;
    clearTimeout(this.reservation);
    this.reservation = undefined;
    this.user = session;
    return true;
  }

  /** Lets a session register again when it is its turn. */
  wait(session) {
    this.waiting.push(session);
  }

  /** Ends a reservation, because the broker has no request. */
  decline(session) {
    if (this.user === session && this.reservation) this.release(session);
  }

  /** Ends the turn of a session, the reservation for it, or its wait. */
  release(session) {
    this.waiting = this.waiting.filter(other => other !== session);
    if (this.user !== session) return;
    clearTimeout(this.reservation);
    this.reservation = undefined;
    this.user = this.waiting.shift();
    if (!this.user) return;
    this.reservation = setTimeout(() => this.release(this.user), RESERVED);
    this.user.register();
  }
}

/** The registrations of a service with one broker, one after another. */
class Registrations {
  constructor(service, address, turns) {
    Object.assign(this, { service, address, turns, stopping: false });
  }

  /** Passes on what the main thread wants. */
  tell({ stop, token, body, part }) {
    if (stop) this.stopping = true;
    if (stop && this.wake) this.wake();
    if (this.session && part) this.session.sendPart(token, part);
    else if (this.session && token !== undefined) this.session.reply(token, body);
    if (this.session && stop) this.session.endIfIdle();
  }

  /** Logs a text, which names the broker if there are several. */
  log(text) {
    const { endpoint, named } = this.address;
    parentPort.postMessage({ log: named && !text.includes(endpoint) ? `${endpoint}: ${text}` : text });
  }

  /** Registers again after each loss, until it is told to stop. */
  async keep() {
    const { endpoint } = this.address;
    for (let number = 0; !this.stopping; number++) {
      let log, pause = HEARTBEAT_INTERVAL / 2; // it limits the rate if the broker keeps rejecting the service
      try {
        const session = this.session = new Session(this, number);
        log = `${await session.over}; reconnecting to ${endpoint}`;
        if (session.refused) {
          pause = REFUSED_PAUSE;
          log = `refused: ${session.why}; trying again in ${pause / 1000}s`;
        }
      } catch (error) {
        log = `${error.message}; reconnecting to ${endpoint}`;
      }
      if (this.stopping) break;
      this.log(log);
      let timer;
      await new Promise(resolve => {
        this.wake = resolve;
        timer = setTimeout(resolve, pause);
      });
      clearTimeout(timer);
    }
  }
}

/** One registration, from READY to DISCONNECT, on a new socket. over resolves to the reason why it ended. */
class Session {
  constructor(owner, number) {
    const { endpoint, keys } = owner.address;
    Object.assign(this, { owner, turns: owner.turns, number, requests: 0, refused: false });
    this.socket = dealer(endpoint, keys, 'bservice', socket => {
      refusalOf(socket, endpoint, keys).catch(error => this.refuse(error.message));
      socket.events.on('disconnect', () => {
        if (this.streams()) this.leave('lost the connection to the broker');
      });
    });
    this.sent = Promise.resolve();
    this.over = new Promise(resolve => { this.end = resolve; });
    this.register();
    this.ticker = setInterval(() => this.tick(), HEARTBEAT_INTERVAL);
    this.receive();
  }

  send(...frames) {
    this.pass(['', WORKER, ...frames]);
  }

  pass(message) {
    // zeromq allows only one send at a time.
    this.sent = this.sent.then(() => send(this.socket, message)).catch(() => {});
  }

  register() {
    this.registered = true;
    this.heard = Date.now();
    this.send(READY, this.owner.service);
  }

  /** Returns whether the current request takes parts. */
  streams() {
    return Boolean(this.address) && this.credit !== undefined;
  }

  /** Ends the session, once the current request has ended. A stream is told to end. */
  leave(why) {
    this.why = this.why || why;
    if (this.streams()) parentPort.postMessage({ token: this.token, over: true });
  }

  /** Ends the session because of what the key may not. */
  refuse(why) {
    if (this.why) return;
    this.leave(why);
    this.refused = true;
    this.endIfIdle();
  }

  tick() {
    if (!this.why && this.registered) this.send(HEARTBEAT);
    // Some brokers send no heartbeats to a busy worker.
    if (!this.address && this.registered && Date.now() - this.heard > SILENCE) this.why = 'no heartbeat from the broker';
    this.endIfIdle();
  }

  async receive() {
    for await (let frames of messagesOf(this.socket)) {
      this.heard = Date.now();
      if (frames[0].length === 0) frames = frames.slice(1); // the broker of Dispatchr Backbone may omit it
      const [protocol, command, ...rest] = frames.map(String);
      if (protocol === WORKER02 && command === WORKER_CREDIT) this.grant(...rest);
      if (protocol !== WORKER) continue;
      // bbroker tells a service what its key may not.
      if (command === DISCONNECT && rest.length === 2 && rest[0] === NOT_ALLOWED) this.refuse(printable(rest[1]));
      else if (command === DISCONNECT) this.leave('the broker sent DISCONNECT');
      if (command === HEARTBEAT) this.turns.decline(this);
      const cut = rest.indexOf('');
      if (command === REQUEST && cut >= 0 && !this.address && this.registered) {
        if (this.turns.take(this)) {
          this.address = frames.slice(2, 2 + cut + 1);
          this.token = `${this.owner.address.endpoint} ${this.number}.${++this.requests}`;
          const match = cut === 1 && STREAM_TOKEN.exec(rest[0]);
          this.credit = match ? Number(match[1]) : undefined;
          parentPort.postMessage({ token: this.token, body: frames.slice(2 + cut + 1), credit: this.credit });
        } else {
          this.send(DISCONNECT, ...BUSY);
          this.registered = false;
          this.turns.wait(this);
        }
      }
      this.endIfIdle();
    }
  }

  /** Passes on a grant of the broker, unless it is for an earlier request. */
  grant(address, empty, number) {
    if (!this.streams() || address !== String(this.address[0]) || empty !== '' || !/^[0-9]{1,9}$/.test(number)) return;
    parentPort.postMessage({ token: this.token, credit: Number(number) });
  }

  sendPart(token, part) {
    if (this.streams() && token === this.token && !this.why) this.pass([WORKER02, WORKER_PARTIAL, ...this.address, part]);
  }

  /** Sends the first reply to the current request. Ignores any other reply. */
  reply(token, body) {
    if (!this.address || token !== this.token) return;
    if (this.why) this.owner.log(`reply dropped: ${this.why}`);
    else if (this.streams()) this.pass([WORKER02, WORKER_FINAL, ...this.address, ...body]);
    else this.send(REPLY, ...this.address, ...body);
    this.address = undefined;
    this.turns.release(this);
    this.endIfIdle();
  }

  /** Ends the session if it is over or stopping, but not before the current request has ended. */
  endIfIdle() {
    if (this.address || this.ended || !(this.why || this.owner.stopping)) return;
    this.ended = true;
    this.turns.release(this);
    clearInterval(this.ticker);
    if (!this.why) {
      if (this.registered) this.send(DISCONNECT);
      this.socket.linger = 1000;
    }
    const end = () => {
      this.socket.close();
      this.end(this.why);
    };
    if (this.refused) end(); // what is not sent yet may never be
    else this.sent.then(end);
  }
}

/** Serves a command. Runs it with its options, followed by the frames of the request, as arguments. */
class CmdService extends BackboneService {
  /**
   * @param {string} service
   * @param {string} cmd
   * @param {string|null} [host]
   * @param {number|string|null} [port]
   * @param {string[]} [options]
   * @param {{stdin?: boolean, log?: (text: string) => void} & Address} [flags]
   */
  constructor(service, cmd, host, port, options = [], { broker, key, brokerKey, stdin = false, log } = {}) {
    super(service, (message, reply) => this._run(message, reply), { host, port, broker, key, brokerKey, log, encoding: null });
    this.command = [cmd, ...options];
    this.stdin = stdin;
  }

  _run(message, reply) {
    const stdin = this.stdin && message.length ? message.pop() : undefined;
    const args = message.map(frame => decode(frame, 'utf8'));
    if (args.some(arg => typeof arg !== 'string')) {
      throw new StatusError(126, '', 'an argument is not UTF-8, which Node.js requires\n');
    }
    return new Promise((resolve, reject) => {
      const fail = error => reject(new StatusError(error.code === 'ENOENT' ? 127 : 126, '', `${error.message}\n`));
      let child;
      try {
        child = spawn(this.command[0], [...this.command.slice(1), ...args], { stdio: [stdin ? 'pipe' : 'ignore', 'pipe', 'pipe'] });
      } catch (error) {
        fail(error);
        return;
      }
      const stdout = [], stderr = [];
      child.stdout.on('data', chunk => stdout.push(chunk));
      child.stderr.on('data', chunk => stderr.push(chunk));
      // Ignore errors: the command may exit without reading all of its input.
      if (stdin) child.stdin.on('error', () => {}).end(stdin);
      child.on('error', fail);
      child.on('close', (code, signal) => {
        const status = signal ? 128 + os.constants.signals[signal] : code;
        if (status === 0) reply(Buffer.concat(stdout));
        else reject(new StatusError(status, Buffer.concat(stdout), Buffer.concat(stderr)));
        resolve();
      });
    });
  }
}

// The command line.

const USAGE = `usage: backbone.js request [FLAGS] NAME [ARG...]
       backbone.js service [FLAGS] NAME COMMAND [ARG...]

request works like brequest, and service like bservice, with these flags:
  -t, --timeout DURATION    request: give up after this long; 0 waits forever (30s)
  -n, --no-input            request: do not read standard input
  -0, --null                request: use NUL bytes instead of newlines
      --stdin               request: send standard input as one last argument
                            service: use the last argument as standard input
      --host HOST           host of the broker (127.0.0.1)
  -p, --port PORT           port of the broker (5555)
  -b, --broker ENDPOINT     use this broker instead: tcp://HOST:PORT[#KEY] or ipc:///PATH; may be repeated
      --broker-key KEY      public key of the broker, for one that takes keys
      --key FILE            one's own secret key, which the broker knows
  -q, --quiet               print errors only
  -h, --help                print this help
`;

const PLACE = ['--host', '--port', '--broker', '--broker-key', '--key'];
const TAKES_VALUE = ['--timeout', ...PLACE];
const SHORT = {
  '-t': '--timeout', '-n': '--no-input', '-0': '--null', '-p': '--port', '-b': '--broker', '-q': '--quiet', '-h': '--help',
};
const FLAGS = {
  request: [...TAKES_VALUE, '--no-input', '--null', '--stdin', '--quiet', '--help'],
  service: [...PLACE, '--stdin', '--quiet', '--help'],
};

/** Returns the flags, the name and the rest. Flags end at -- or at the first argument after the name. */
function parse(verb, words) {
  const flags = {};
  let name;
  words = [...words];
  while (words.length) {
    const word = words.shift();
    if (word === '--') {
      if (name === undefined) name = words.shift();
      break;
    }
    if (!word.startsWith('-') || word === '-') {
      if (name !== undefined) {
        words.unshift(word);
        break;
      }
      name = word;
      continue;
    }
    let [, flag, value] = /^([^=]*)(?:=([^]*))?$/.exec(word);
    flag = SHORT[flag] || flag;
    if (!FLAGS[verb].includes(flag)) {
      throw new UsageError(`unknown flag ${word}\nhint: put -- before an argument that looks like a flag`);
    }
    if (TAKES_VALUE.includes(flag) && value === undefined) {
      if (!words.length) throw new UsageError(`${flag} needs a value`);
      value = words.shift();
    }
    if (value === undefined) value = '';
    flags[flag] = flag === '--broker' ? [...(flags[flag] || []), value] : value;
  }
  return { flags, name, rest: words };
}

/** Returns a duration in milliseconds. */
function duration(text) {
  const match = /^(\d+\.?\d*|\.\d+)(h|m|s|ms|)$/.exec(text);
  if (!match) throw new UsageError(`${JSON.stringify(text)} is not a duration such as 5, 0.5 or 500ms`);
  return match[1] * { h: 3600000, m: 60000, s: 1000, ms: 1, '': 1000 }[match[2]];
}

async function readInput() {
  const chunks = [];
  for await (const chunk of process.stdin) chunks.push(chunk);
  return Buffer.concat(chunks);
}

function split(input, separator) {
  const lines = [];
  for (let at = 0; at < input.length;) {
    const end = input.indexOf(separator, at);
    lines.push(input.subarray(at, end < 0 ? input.length : end));
    at = end < 0 ? input.length : end + 1;
  }
  return lines;
}

function write(data) {
  return new Promise((resolve, reject) => {
    process.stdout.on('error', reject);
    process.stdout.write(data, error => (error ? reject(error) : resolve()));
  });
}

function addressIn(flags) {
  return { broker: (flags['--broker'] || []).filter(Boolean), key: flags['--key'], brokerKey: flags['--broker-key'] };
}

async function request({ flags, name, rest }) {
  const timeout = duration(flags['--timeout'] || '30');
  const separator = '--null' in flags ? '\0' : '\n';
  let message = rest;
  if ('--stdin' in flags) message = [...rest, await readInput()];
  else if (!rest.length && !('--no-input' in flags) && !process.stdin.isTTY) message = split(await readInput(), separator);

  const stop = new AbortController();
  for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => stop.abort({ signal }));
  const client = new BackboneClient(flags['--host'], flags['--port'], { ...addressIn(flags), encoding: null });
  const reply = await client.send(name, message, timeout, { signal: stop.signal });
  await write(Array.isArray(reply) ? Buffer.concat(reply.flatMap(frame => [frame, Buffer.from(separator)])) : reply);
  await client.disconnect();
}

async function service({ flags, name, rest }) {
  if (!rest.length) throw new UsageError(`no command for ${name}`);
  const log = '--quiet' in flags ? () => {} : undefined;
  const served = new CmdService(name, rest[0], flags['--host'], flags['--port'], rest.slice(1),
    { ...addressIn(flags), stdin: '--stdin' in flags, log });
  await served.start();
}

async function main(verb, words) {
  const say = text => process.stderr.write(`${text.split('\n').map(line => `backbone.js: ${line}\n`).join('')}`);
  let parsed = {};
  try {
    if (verb === '-h' || verb === '--help') return await write(USAGE), 0;
    if (!FLAGS[verb]) throw new UsageError('the first argument must be request or service\nhint: backbone.js --help');
    parsed = parse(verb, words);
    if ('--help' in parsed.flags) return await write(USAGE), 0;
    if (!parsed.name) throw new UsageError('no service name');
    await { request, service }[verb](parsed);
    return 0;
  } catch (error) {
    if (error.signal) {
      process.kill(process.pid, error.signal);
      await new Promise(resolve => setTimeout(resolve, 1000));
      return 128 + os.constants.signals[error.signal];
    }
    if (error instanceof StatusError) {
      await write(error.stdout);
      process.stderr.write(error.stderr);
      return error.status;
    }
    if (error.code === 'EPIPE') return 141;
    say(error instanceof BackboneError && !(error instanceof UsageError) ? `${parsed.name}: ${error.message}` : error.message);
    return error instanceof BackboneError ? error.status : 74;
  }
}

if (workerData && workerData.backboneService !== undefined && parentPort) {
  serveAll(workerData);
} else if (require.main === module) {
  main(process.argv[2], process.argv.slice(3)).then(status => { process.exitCode = status; });
}

module.exports = {
  BackboneClient, BackboneClientMessage, BackboneService, CmdService,
  BackboneError, UsageError, RequestTimeout, NoBroker, ConnectionLost, ProtocolError, NotAllowed, StatusError,
};
