#!/usr/bin/env python3
"""Clients and services for Backbone. Copy this one file; it requires only pyzmq.

    from backbone import BackboneClient, BackboneService

    client = BackboneClient()
    print(client.send('ls-service', '/tmp'))

    def on_request(message, reply):
        reply(['hello'] + message)
    BackboneService('greet', on_request).start()

The protocol is MDP/0.1 (RFC 7), and MDP/0.2 (RFC 18) for streams. A message to send is a str, bytes, or a list of them. A
service receives a list of str. A client receives a str if the reply has one frame, and a
list of str otherwise. A frame that is not UTF-8 is bytes instead of str; with encoding=None,
every frame is bytes.

The file is also a program: backbone.py request|service --help
"""
import asyncio
import collections
import collections.abc
import concurrent.futures
import contextlib
import gc
import inspect
import math
import os
import queue
import re
import signal
import socket as sockets
import stat
import struct
import subprocess
import sys
import threading
import time
import weakref
from typing import Any, AsyncIterator, Callable, Deque, Dict, Iterator, List, Optional, Sequence, Union

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

Frame = Union[str, bytes]
Message = Union[None, Frame, Sequence[Frame]]
Reply = Any  # a Frame or a list of them; the caller of a service knows which
OnMessage = Callable[[Any], object]  # gets a Reply or a BackboneError
OnStderr = Callable[[bytes], object]
OnRequest = Callable[[List[Any], Callable[[Message], None]], object]
Host = Union[None, str, Dict[str, Any]]
Port = Union[None, str, int]
Broker = Union[None, str, Sequence[str]]  # endpoints, in the order of preference

CLIENT, WORKER = b'MDPC01', b'MDPW01'
READY, REQUEST, REPLY, HEARTBEAT, DISCONNECT = b'\1', b'\2', b'\3', b'\4', b'\5'

# MDP/0.2. The command bytes of its clients and its workers differ.
CLIENT02, WORKER02 = b'MDPC02', b'MDPW02'
CLIENT_REQUEST, CLIENT_PARTIAL, CLIENT_FINAL = b'\1', b'\2', b'\3'
WORKER_PARTIAL, WORKER_FINAL, WORKER_CREDIT = b'\3', b'\4', b'\7'
STREAM_TOKEN = re.compile(rb'[0-9a-f]{8}\.[0-9]+~([1-9][0-9]*)(@.*)?', re.DOTALL)  # of bbroker, for a client that takes parts
PART_SIZE = 64 << 10      # bytes of a part at most
MAX_COLLECTED = 64 << 20  # bytes of the parts for a client that takes only one reply
STDERR_KEPT = 64 << 10    # bytes of standard error that a StatusError has at the end of a stream

HEARTBEAT_INTERVAL = 1.0  # seconds, in both directions
LIVENESS = 5              # missed heartbeats after which the broker counts as lost
DEFAULT_TIMEOUT = 3.0     # seconds
MAX_TIMEOUT = 2**31 / 1000  # seconds (24 days); a longer timeout counts as none, because ZeroMQ has 31 bits for milliseconds
MAX_CONNECTIONS = 128     # of all clients; each takes three of ZeroMQ's 1023 sockets, and four file descriptors
COLLECT_PAUSES = 0.1, 60  # seconds, the first and the longest, between collections while a reply is missing
CANCEL_PATIENCE = 0.5     # seconds to wait for the reply to mmi.cancel, which some brokers do not support
PATIENCE = 0.25           # seconds to wait for one of several brokers before the next is tried as well
MAX_SEARCHES = 8          # of a client that try more than one broker at a time; each takes further connections
FARTHEST = 1.0            # seconds that one of several brokers may take to tell whether it has the service
RESERVED = 0.5            # seconds for which a session has on_request after its turn has come, unless its broker has no request
REFUSED_PAUSE = 30.0      # seconds before a service tries again that its broker refused: somebody has to change what it may

PUBLIC_PREFIX, SECRET_PREFIX = 'bbpub-', 'bbsec-'  # of keys as text; 64 hexadecimal digits follow
NOT_ALLOWED = b'77'       # the frame by which bbroker tells a service why it sends DISCONNECT
BUSY = b'75', b'busy'     # the frames by which a service tells a broker that it hands a request back
NO_COMMON_MECHANISM = 0x11000002  # the value of HANDSHAKE_FAILED_PROTOCOL if one side wants keys and the other none
MAX_FAILED = 3            # handshakes in a row that fail without a reason before it is the keys; a broker that stops may cause one
MAX_SUSPICIONS = 2        # times that this happens before it is another broker; one that has no room closes connections, too


class BackboneError(Exception):
    """A request or a service failed. status is the exit status that brequest would have."""
    status = 1

    def __init__(self, message: object = '', status: Optional[int] = None) -> None:
        super().__init__(message)
        if status is not None:
            self.status = status


class UsageError(BackboneError):
    """An argument, a message or an environment variable cannot be used."""
    status = 64


class RequestTimeout(BackboneError):
    """No reply arrived within the timeout."""
    status = 124


class NoBroker(RequestTimeout):
    """No broker could be reached within the timeout."""
    status = 69


class ConnectionLost(BackboneError):
    """The connection to the broker was lost before the reply."""
    status = 69


class ProtocolError(BackboneError):
    """The broker sent an invalid reply, or takes no keys."""
    status = 76


class NotAllowed(BackboneError):
    """The broker does not admit the key."""
    status = 77


class StatusError(BackboneError):
    """The service failed. Raise it in on_request to send this failure to the client."""

    def __init__(self, status: int, stdout: Frame = b'', stderr: Frame = b'') -> None:
        self.status, self.stdout, self.stderr = status, stdout, stderr
        super().__init__(_text(stderr).strip() or 'exit status %s' % status)


def _bytes(frame):
    if isinstance(frame, (bytes, bytearray, memoryview)):
        return bytes(frame)
    try:
        return str(frame).encode('utf-8', 'surrogateescape')
    except Exception as error:
        raise UsageError('cannot send a %s: %s' % (type(frame).__name__, error)) from error


def _text(frame):
    return frame if isinstance(frame, str) else bytes(frame).decode('utf-8', 'replace')


def _frames(message):
    """Returns the frames of a message, which is None, one frame, or a list of frames."""
    if message is None:
        return []
    return [_bytes(frame) for frame in (message if isinstance(message, (list, tuple)) else [message])]


def _decode(frame, encoding):
    try:
        return frame.decode(encoding) if encoding else frame
    except UnicodeDecodeError:
        return frame


def _endpoints(host, port, broker):
    """Returns the endpoints of the brokers, each perhaps with #KEY: one or more."""
    source, endpoints = 'broker', broker
    if not broker and not host and not port:
        source, endpoints = 'BACKBONE_BROKER', os.environ.get('BACKBONE_BROKER', '').split()
    if endpoints:
        endpoints = [str(endpoint) for endpoint in (endpoints if isinstance(endpoints, (list, tuple)) else [endpoints])]
        for endpoint in endpoints:
            # What libzmq says about a single endpoint is good enough.
            if not (endpoint.startswith(('tcp://', 'ipc://')) if len(endpoints) == 1 else _is_endpoint(endpoint)):
                # What follows # may be a secret key, by mistake.
                raise UsageError('%s must be tcp://HOST:PORT or ipc:///PATH, not %r' % (source, endpoint.partition('#')[0]))
        return endpoints
    host = str(host or os.environ.get('BACKBONE_HOST') or '127.0.0.1')
    source = 'port' if port else 'BACKBONE_PORT'
    port = str(port or os.environ.get('BACKBONE_PORT') or '5555')
    if not re.fullmatch('[0-9]{1,5}', port) or int(port) > 65535:
        raise UsageError('%s must be a number from 0 to 65535, not %r' % (source, port))
    return ['tcp://%s:%s' % ('[%s]' % host.strip('[]') if ':' in host else host, port)]


def _is_endpoint(text):
    # ZeroMQ takes a source address before a semicolon.
    tcp = re.fullmatch(r'tcp://([^#]*;)?(\[[^][#]+\]|[^][:;#\s]+):(?P<port>[0-9]{1,5})(#.*)?', text, re.DOTALL)
    return int(tcp['port']) < 65536 if tcp else text.startswith('ipc://') and text != 'ipc://'


def _addresses(host, port, broker, key, broker_key):
    """Returns the addresses of the brokers, each once: an endpoint, and the _Keys for connections to it, or None."""
    endpoints = _endpoints(host, port, broker)
    if (key or broker_key) and all(endpoint.startswith('ipc://') for endpoint in endpoints):
        raise UsageError('an ipc endpoint takes no keys: %s' % endpoints[0])
    addresses = {}
    for endpoint in endpoints:
        keys = None  # for ipc; the environment may have keys for other endpoints
        if endpoint.startswith('tcp://'):
            endpoint, keys = _tcp_address(endpoint, len(endpoints) == 1, key, broker_key)
        addresses.setdefault(endpoint, keys)
    return list(addresses.items())


def _tcp_address(text, only, key, broker_key):
    endpoint, has_key, text = text.partition('#')
    source = 'the key in ' + endpoint
    if not has_key:
        source, text = _set_by('broker_key', broker_key, 'BACKBONE_BROKER_KEY')
    elif only and broker_key and str(broker_key) != text:
        raise UsageError('broker_key is another key than that in %s' % endpoint)
    own_source, key = _set_by('key', key, 'BACKBONE_KEY')
    own = _secret_key(own_source, key) if key else None
    if text or has_key:
        return endpoint, _Keys(_public_key(source, str(text)), own)
    if own:
        raise UsageError('%s needs broker_key, the public key of the broker' % own_source)
    return endpoint, None


def _join(addresses, separator=' '):
    return separator.join(endpoint for endpoint, _ in addresses)


def _set_by(name, value, variable):
    """Returns an argument, or else an environment variable: its name and its value."""
    return (name, value) if value else (variable, os.environ.get(variable))


class _Keys:
    """The keys for connections to a broker. As an object of this class it does not show the secret key."""

    def __init__(self, broker, own):
        if not zmq.has('curve'):
            raise BackboneError('this libzmq has no CURVE, which keys need', 69)
        self.broker, self.own = broker, own  # own is None for a new key that nobody knows

    def set(self, socket):
        if self.own:
            public, secret = zmq.curve_public(z85.encode(self.own)), self.own
        else:
            public, secret = zmq.curve_keypair()
        socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = self.broker, public, secret


def _public_key(source, text):
    """Returns the bytes of a public key: in our form, or in the Z85 of other tools."""
    if re.fullmatch(PUBLIC_PREFIX + '[0-9a-fA-F]{64}', text):
        return bytes.fromhex(text[len(PUBLIC_PREFIX):])
    if SECRET_PREFIX in text:
        raise UsageError('%s: that is a secret key, which nobody else may see; a public key is wanted' % source)
    if len(text) == 40 and not text.startswith(PUBLIC_PREFIX):
        with contextlib.suppress(LookupError, ValueError, struct.error):
            return z85.decode(text)
    raise UsageError('%s: %r is not a public key (%s and 64 hexadecimal digits)' % (source, text[:80], PUBLIC_PREFIX))


def _secret_key(source, path):
    """Returns the bytes of the secret key in a file that nobody else may read: its only line that is no comment."""
    if SECRET_PREFIX in str(path) and not os.path.exists(path):
        raise UsageError('%s: that is a secret key; the name of the file that has it is wanted' % source)
    try:
        with open(os.fspath(path), 'rb') as file:
            info, content = os.fstat(file.fileno()), file.read(1 << 16)
    except (OSError, TypeError, ValueError) as error:
        raise UsageError('%s: %s' % (source, error)) from error
    lines = [line.strip() for line in content.decode('latin-1').split('\n')]
    keys = [line for line in lines if line and not line.startswith('#')]
    why = ''
    if not keys:
        why = 'the file has no secret key'
    elif keys[0].startswith(PUBLIC_PREFIX):
        why = 'that is a public key; a secret key is wanted'
    elif len(keys) > 1 or not re.fullmatch(SECRET_PREFIX + '[0-9a-fA-F]{64}', keys[0]):
        why = 'not a file with one secret key (%s and 64 hexadecimal digits)' % SECRET_PREFIX
    if why:
        raise UsageError('%s: %s: %s' % (source, path, why))
    # A file of somebody else, as a credential of systemd is, may be there for the group of this process.
    forbidden = 0o077 if info.st_uid == os.geteuid() else 0o007
    if stat.S_ISREG(info.st_mode) and info.st_mode & forbidden:
        raise UsageError('%s: %s has mode %04o: others may read it' % (source, path, info.st_mode & 0o777))
    return bytes.fromhex(keys[0][len(SECRET_PREFIX):])


def _identity(tool):
    """Returns a unique, printable identity that names the tool, the host and the process."""
    return ('%s.%s.%d.%s' % (tool, sockets.gethostname()[:200], os.getpid(), os.urandom(8).hex())).encode()


def _dealer(endpoint, keys, tool):
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.identity = _identity(tool)
    socket.linger = 0
    socket.reconnect_ivl, socket.reconnect_ivl_max = 20, 1000
    socket.ipv6 = '[' in endpoint
    if keys:
        keys.set(socket)
    return socket


def _connect(socket, endpoint):
    try:
        socket.connect(endpoint)
    except (zmq.ZMQError, ValueError) as error:
        raise UsageError('connect %s: %s' % (endpoint, error)) from error
    return socket


def _mechanism(endpoint, keys):
    """Returns b'CURVE' if the broker at an endpoint takes keys, b'NULL' if it takes none, or b'' if that is unknown.

    With keys, it also returns whether a broker that takes keys keeps the connection, as one that has room does.

    If keys are the matter, ZeroMQ may close a connection before it has said so. To a peer that stops in
    the middle of its greeting (ZMTP 3.0, RFC 23), it sends all of its own.
    """
    host, _, port = endpoint[len('tcp://'):].rpartition(':')
    with contextlib.suppress(OSError, ValueError):
        with sockets.create_connection((host.strip('[]'), int(port)), 1) as connection:
            connection.sendall(b'\xff' + bytes(7) + b'\1\x7f\3')
            with connection.makefile('rb') as greeting:
                mechanism, kept = greeting.read(64)[12:32].rstrip(b'\0'), False
            if keys and mechanism == b'CURVE':
                connection.settimeout(0.1)
                try:
                    connection.recv(1)
                except sockets.timeout:
                    kept = True
            return mechanism, kept
    return b'', False


@contextlib.contextmanager
def _wrap(kind, endpoint):
    """Turns an error of a kind, such as too many open files, into a BackboneError."""
    try:
        yield
    except kind as error:
        raise BackboneError('%s: %s' % (endpoint, error), 74) from error


def _seconds(timeout):
    """Returns a timeout in seconds, or 0 for none."""
    try:
        seconds = DEFAULT_TIMEOUT if timeout is None else float(timeout)
        if math.isnan(seconds):
            raise ValueError('not a number')
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError('a timeout must be a number of seconds, not %r' % (timeout,)) from error
    return seconds if 0 < seconds < MAX_TIMEOUT else 0


def _deadline(timeout):
    return time.monotonic() + timeout if timeout else None


class BackboneClientMessage:
    """A request and its reply, as the frames that a REQ socket sends and receives."""

    def __init__(self, service: Frame, message: Message = None, encoding: Optional[str] = 'utf-8') -> None:
        self.service, self.message, self.encoding = service, message, encoding
        self.reply: Reply = None

    def serialize(self) -> List[bytes]:
        return [CLIENT, _bytes(self.service)] + _frames(self.message)

    def parse_reply(self, raw: Sequence[bytes], simplify_short_reply: bool = True) -> Reply:
        """Returns the frames of the reply; by default, a single frame without a list.

        Raises a StatusError if the reply reports a failure.
        """
        if len(raw) < 2 or raw[0] != CLIENT or raw[1] != _bytes(self.service):
            raise ProtocolError('bad reply: %r' % (list(raw[:4]),))
        body = list(raw[2:])
        status = _status(body)
        if status is not None:
            if status.status != 0:
                raise status
            body = [status.stdout]
        body = [_decode(frame, self.encoding) for frame in body]
        self.reply = body[0] if simplify_short_reply and len(body) == 1 else body
        return self.reply

    def get_reply(self) -> Reply:
        return self.reply

    parseReply = parseResponse = parse_response = parse_reply
    getReply = get_reply


def _status(body):
    """Returns the status reply in body as a StatusError, or None if body is data."""
    if len(body) == 2 and body[0] == b'Error':
        return StatusError(1, b'', body[1] + b'\n')
    if len(body) == 3 and body[2].startswith(b'exit status '):
        number = body[2][len(b'exit status '):]
        if number.isdigit() and int(number) < 256:
            return StatusError(int(number), body[0], body[1])
    return None


class _Turns:
    """Lets a number of requests proceed at a time. Others wait, and proceed in the order in which they came."""

    def __init__(self, number):
        self.taken = 0
        self._number, self._waiting = number, collections.deque()
        self.lock = threading.RLock()  # reentrant, because the collector may end a request at any time

    def take(self):
        """Returns a future that is done once the caller may proceed."""
        turn = concurrent.futures.Future()
        with self.lock:
            if self.taken < self._number:
                self.taken += 1
                turn.set_result(None)
            else:
                self._waiting.append(turn)
        return turn

    def give_back(self, turn):
        """Ends a turn, or the wait for it."""
        with self.lock:
            if not turn.done():
                self._waiting.remove(turn)
            elif self._waiting:
                self._waiting.popleft().set_result(None)
            else:
                self.taken -= 1


_turns = _Turns(MAX_CONNECTIONS)
_clients: 'weakref.WeakSet[BackboneClient]' = weakref.WeakSet()


class _Connection:
    """A socket, and the state of its connection. A client has one for each request at a time, a service one."""

    def __init__(self, endpoint, keys, tool):
        self.socket = _dealer(endpoint, keys, tool)
        self.monitor = self.socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        # finalize also closes the sockets when self is garbage collected. Without it, the
        # collector would close the monitor before the socket that it monitors.
        self.close = weakref.finalize(self, self._close, self.socket, self.monitor)
        self.endpoint, self.keys = endpoint, keys
        self.connected = self.lost = False
        self.retried = False  # the last attempt has failed
        self.failed = 0       # handshakes in a row
        self.suspicions = 0   # times in a row that they failed while the broker kept another connection
        self.refused = None   # the error that says why no connection will come about
        self.names = set()    # of services that the broker had, if it is one of several
        self.partials = None  # whether the broker passes on partial replies; None if that is not known yet
        self.credit = False   # whether it also takes mmi.credit
        self.unanswered = 0   # questions and grants of a stream that may still be answered
        _connect(self.socket, endpoint)

    def update(self):
        """Updates connected, lost, retried and refused from the events of the monitor."""
        while self.monitor.poll(0):
            told = recv_monitor_message(self.monitor)
            if told['event'] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.connected, self.retried, self.failed, self.suspicions = True, False, 0, 0
            elif told['event'] == zmq.EVENT_CONNECT_RETRIED:
                self.retried = not self.connected
            elif told['event'] == zmq.EVENT_DISCONNECTED:
                self.lost = self.lost or self.connected
            else:
                self.failed += 1
                self.refused = self.refused or self._refusal(told['event'], told['value'])

    def _refusal(self, event, value):
        """Returns what a failed handshake reveals about the keys, as an error, or None."""
        kind, why = NotAllowed, ''
        mismatch = event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == NO_COMMON_MECHANISM
        theirs = b''
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and self.failed >= MAX_FAILED:
            theirs, kept = _mechanism(self.endpoint, self.keys)
            self.failed, self.suspicions = 0, self.suspicions + 1 if kept else 0
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and value == 400 and not self.keys:
            why = 'the broker refuses the connection'
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and value == 400:
            why = 'the broker does not know this key' if self.keys.own else 'the broker admits only keys that it knows'
        elif self.keys and (mismatch or theirs == b'NULL'):
            kind, why = ProtocolError, 'the broker takes no keys'
        elif not self.keys and (mismatch or theirs == b'CURVE'):
            why = 'the broker wants a key'
        elif theirs == b'CURVE' and self.suspicions >= MAX_SUSPICIONS:
            why = 'the broker has another key than expected'
        return kind('%s: %s' % (why, self.endpoint)) if why else None

    @staticmethod
    def _close(socket, monitor):
        socket.disable_monitor()  # first: otherwise ZeroMQ waits for the monitor forever
        monitor.close(0)
        socket.close()


SERVES, VACANT, FAILED = 'serves', 'vacant', 'failed'


class _Attempt:
    """One of several brokers that may get a request: the connection, and whether the broker has the service."""

    def __init__(self, client, place, name):
        self.client, self.place, self.name = client, place, name
        self.connection = client._take_idle(lambda idle: idle.endpoint == client._brokers[place][0]) or client._open(place)
        self.asked = False
        self.verdict = None  # or SERVES, VACANT or FAILED; the last one may change
        self.since = time.monotonic()

    def update(self):
        """Updates the verdict. Asks the broker as soon as the connection stands."""
        connection, now = self.connection, time.monotonic()
        if connection.lost and now >= self.since + PATIENCE:
            connection.close()
            connection = self.connection = self.client._open(self.place)
            self.asked = False
        connection.update()
        if connection.connected and not connection.lost and not self.asked:
            self.asked, self.verdict, self.since = True, None, now if self.verdict else self.since
            if self.name.startswith(b'mmi.'):
                self.verdict = SERVES
            else:
                with contextlib.suppress(zmq.Again):  # the connection has just ended
                    connection.socket.send_multipart([b'', CLIENT, b'mmi.service', self.name], zmq.NOBLOCK)
        if self.asked and connection.socket.poll(0):
            self.verdict = VACANT if connection.socket.recv_multipart()[3:] == [b'404'] else SERVES
        if connection.lost and self.verdict != FAILED:
            self.verdict, self.since = FAILED, now
        elif connection.refused or connection.retried:
            self.verdict = FAILED


class BackboneClient:
    """Sends requests to services. Any number of threads may use it at once.

    Each concurrent request has its own connection. The clients of a process have MAX_CONNECTIONS
    of them; more requests wait for their turn.

    Of several brokers, the first that can be reached and has the service gets the request.
    """

    def __init__(self, *address: Any, host: Optional[str] = None, port: Port = None, broker: Broker = None,
                 encoding: Optional[str] = 'utf-8', key: Optional[str] = None, broker_key: Optional[str] = None) -> None:
        # (host, port), or (name, host, port) as in a README of Dispatchr Backbone.
        given = ([None, None] + list(address))[-2:] if len(address) > 2 else (list(address) + [None, None])[:2]
        self.host, self.port = given[0] or host, given[1] or port
        self._brokers = _addresses(self.host, self.port, broker, key, broker_key)
        self.endpoint = _join(self._brokers)
        self.encoding = encoding
        self._idle: Deque[_Connection] = collections.deque()
        self._first = 0  # the broker to begin with
        self._searches = threading.BoundedSemaphore(MAX_SEARCHES)
        with _turns.lock:
            _clients.add(self)

    def get_endpoint(self) -> str:
        return self.endpoint

    getEndpoint = get_endpoint

    def connect(self) -> 'BackboneClient':
        """Starts to connect, and returns at once. This is optional: send connects as well."""
        with _wrap(zmq.ZMQError, self.endpoint):
            self._idle.append(self._open(self._first))
        return self

    def disconnect(self) -> 'BackboneClient':
        """Closes the connections that no request uses. send opens new ones, to the first broker if it can."""
        self._first = 0
        self._close_idle()
        return self

    def _close_idle(self):
        while self._idle:
            with contextlib.suppress(IndexError):
                self._idle.pop().close()

    close = disconnect

    def __enter__(self) -> 'BackboneClient':
        return self.connect()

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    def _take_idle(self, fits=lambda connection: True):
        """Returns an idle connection that fits and still stands, or None."""
        for connection in reversed(list(self._idle)):
            if not fits(connection):
                continue
            try:
                self._idle.remove(connection)
            except ValueError:  # another thread has taken it
                continue
            connection.update()
            if not connection.lost and not connection.refused:
                return connection
            connection.close()
        return None

    def _open(self, place):
        """Returns a new connection to a broker. It may take the place of idle ones, of any client."""
        with _turns.lock:
            clients = list(_clients)
        if _turns.taken + sum(len(client._idle) for client in clients) > MAX_CONNECTIONS:
            for client in clients:
                client._close_idle()
        return _Connection(*self._brokers[place], 'brequest')

    async def _acquire(self, name, timeout, end):
        """Returns a connection for a request: an idle one, or a new one."""
        if len(self._brokers) == 1:
            return self._take_idle() or self._open(0)
        connection = self._take_idle(lambda idle: name in idle.names) or await self._search(name, timeout, end)
        connection.names.add(name)
        return connection

    async def _search(self, name, timeout, end):
        """Returns a connection to the one of several brokers that is to get a request. Closes all others."""
        attempts: List[_Attempt] = []
        chosen, searching = None, False
        try:
            while True:
                for attempt in attempts:
                    attempt.update()
                now = time.monotonic()
                chosen = self._choice(attempts, now)
                if chosen:
                    # Begin with the first that has answered, not with one that is away.
                    self._first = next(attempt.place for attempt in attempts if attempt.verdict in (SERVES, VACANT))
                    return chosen.connection
                if end is not None and now >= end:
                    raise self._not_found(attempts, timeout)
                due = max((attempt.since for attempt in attempts), default=0) + PATIENCE
                if len(attempts) < len(self._brokers) and (not attempts or attempts[-1].verdict or now >= attempts[-1].since + PATIENCE):
                    searching = searching or bool(attempts) and self._searches.acquire(blocking=False)
                    if searching or not attempts:
                        attempts.append(_Attempt(self, self._next_place(attempts), name))
                        continue
                    due = now + PATIENCE / 10
                wait = due - now if due > now else PATIENCE
                sockets = [socket for attempt in attempts for socket in (attempt.connection.socket, attempt.connection.monitor)]
                await self._poll(sockets, 1 + 1000 * (wait if end is None else min(wait, end - now)))
        finally:
            if searching:
                self._searches.release()
            for attempt in attempts:
                if attempt is not chosen:
                    attempt.connection.close()

    def _next_place(self, attempts):
        """Returns the next broker that is not tried yet, from the first one on, round and round."""
        places = [(self._first + step) % len(self._brokers) for step in range(len(self._brokers))]
        return next(place for place in places if place not in [attempt.place for attempt in attempts])

    def _choice(self, attempts, now):
        """Returns the attempt that gets the request, or None as long as that is open. Raises if all are refused."""
        by_verdict = lambda verdict: [attempt for attempt in attempts if attempt.verdict == verdict]
        serving, vacant, pending = by_verdict(SERVES), by_verdict(VACANT), by_verdict(None)
        if serving or len(attempts) < len(self._brokers):
            return serving[0] if serving else None
        if vacant and all(now >= attempt.since + FARTHEST for attempt in pending):
            return vacant[0]
        if all(attempt.connection.refused for attempt in attempts):
            raise min(attempts, key=lambda attempt: attempt.place).connection.refused
        return None

    def _not_found(self, attempts, timeout):
        """Returns the error for a request that no broker got."""
        standing = [attempt.connection.endpoint for attempt in attempts if attempt.asked and not attempt.connection.lost]
        if standing:
            return RequestTimeout('no reply from %s within %gs' % (', '.join(standing), timeout))
        return NoBroker('no broker at %s within %gs' % (_join(self._brokers, ', '), timeout))

    def _leave(self, endpoint):
        """Lets the next request begin with the broker after one that is lost."""
        place = [endpoint for endpoint, _ in self._brokers].index(endpoint)
        self._first = (place + 1) % len(self._brokers)
        for connection in list(self._idle):
            connection.names.clear()  # of all, so that the order counts

    def send(self, service: Frame, message: Message = None, timeout: Union[None, float, OnMessage] = None,
             on_message: Optional[OnMessage] = None) -> Reply:
        """Returns the reply of a service. Waits for a broker that is not running yet.

        timeout is in seconds; 0 means no timeout.

        With on_message, send returns at once. A new thread calls on_message with the reply
        or the BackboneError. on_message may also be given in place of timeout.
        """
        if callable(timeout):
            timeout, on_message = None, timeout
        if on_message:
            def send_and_report():
                try:
                    reply = self.send(service, message, timeout)
                except BackboneError as error:
                    reply = error
                on_message(reply)
            threading.Thread(target=send_and_report).start()
            return None
        try:
            self._ask(service, message, timeout).send(None)  # runs to the end, because _wait and _poll block
        except StopIteration as end:
            return end.value

    async def _wait(self, turn, seconds):
        concurrent.futures.wait([turn], seconds)

    async def _poll(self, waits, milliseconds):
        """Waits until a socket is readable or the time is over. Returns the readable sockets."""
        return dict(_poller(waits).poll(milliseconds))

    async def _ask(self, service, message, timeout):
        timeout = _seconds(timeout)
        end = _deadline(timeout)
        request = BackboneClientMessage(service, message, self.encoding)
        frames = request.serialize()
        async with self._turn(timeout):
            connection = await self._acquire(frames[1], timeout, end)
            async with self._use(connection, frames[1]):
                self._send(connection, CLIENT, *frames[1:])
                reply = await self._receive(connection, end)
                if reply is None:
                    raise self._overdue(connection, timeout)
                return request.parse_reply(reply[1:] if reply[0] == b'' else [])

    @contextlib.asynccontextmanager
    async def _turn(self, timeout):
        """Waits until a request may have a connection."""
        turn = _turns.take()
        try:
            if not turn.done():
                await self._wait(turn, timeout or None)
            if not turn.done():
                raise RequestTimeout('not sent within %gs: %d other requests are in progress' % (timeout, MAX_CONNECTIONS))
            with _wrap(zmq.ZMQError, self.endpoint):
                yield
        finally:
            _turns.give_back(turn)

    @contextlib.asynccontextmanager
    async def _use(self, connection, name):
        """Keeps a connection after a request for the next one, or takes the request back and closes the connection."""
        try:
            yield
        except StatusError:
            self._keep(connection)
            raise
        except BaseException:
            if connection.connected and not connection.lost and not name.startswith(b'mmi.'):
                await self._cancel(connection)
            # Close it, so that a late reply is not taken for the reply to the next request.
            connection.close()
            raise
        self._keep(connection)

    def _keep(self, connection):
        if connection.unanswered:
            connection.close()
        else:
            self._idle.append(connection)

    async def _cancel(self, connection):
        """Cancels the request. The reply, which may come after parts, shows that mmi.cancel was sent."""
        end = time.monotonic() + CANCEL_PATIENCE
        self._send(connection, CLIENT02 if connection.partials else CLIENT, b'mmi.cancel', b'')
        while time.monotonic() < end:
            ready = await self._poll([connection.socket], max(0, end - time.monotonic()) * 1000 + 1)
            if ready and b'mmi.cancel' in connection.socket.recv_multipart()[:4]:
                break

    @staticmethod
    def _send(connection, protocol, name, *body):
        head = [b'', CLIENT, name] if protocol == CLIENT else [CLIENT02, CLIENT_REQUEST, name]
        with contextlib.suppress(zmq.Again):  # the broker has refused the connection; the monitor tells why
            connection.socket.send_multipart(head + list(body), zmq.NOBLOCK)

    async def _receive(self, connection, end):
        """Returns the next message, or None at the end of the time. Raises if the connection is lost or refused."""
        socket, monitor = connection.socket, connection.monitor
        while True:
            left = None if end is None else max(0, end - time.monotonic())
            ready = await self._poll([socket, monitor], None if left is None else left * 1000 + 1)
            connection.update()
            # A broker that stops may send a reply just before it closes the connection.
            if socket in ready or connection.lost and socket.poll(0):
                return socket.recv_multipart()
            if connection.lost:
                self._leave(connection.endpoint)
                raise ConnectionLost('lost the broker at %s before its reply' % connection.endpoint)
            if connection.refused:
                raise connection.refused
            if left == 0:
                return None

    def _overdue(self, connection, timeout):
        """Returns the error for a request that has no reply within the timeout."""
        if connection.connected:
            return RequestTimeout('no reply from %s within %gs' % (connection.endpoint, timeout))
        return NoBroker('no broker at %s within %gs' % (self.endpoint, timeout))

    def stream(self, service: Frame, message: Message = None, timeout: Optional[float] = None,
               on_stderr: Optional[OnStderr] = None) -> Iterator[bytes]:
        """Returns an iterator of the output of a service, as bytes, in parts as they come.

        The first step sends the request. timeout is the longest silence in seconds; 0 means none. on_stderr
        is called with each part of standard error. A failure raises a StatusError after the last part.
        close(), and the end of a loop by break or an exception, take the request back.
        """
        parts = self._stream(service, message, timeout, on_stderr)
        try:
            while True:
                try:
                    parts.__anext__().send(None)  # runs to the end, because _wait and _poll block
                except StopIteration as step:
                    yield step.value
        except StopAsyncIteration:
            pass
        finally:
            with contextlib.suppress(StopIteration):
                parts.aclose().send(None)

    async def _stream(self, service, message, timeout, on_stderr):
        timeout = _seconds(timeout)
        end = _deadline(timeout)
        _, name, *body = BackboneClientMessage(service, message).serialize()
        async with self._turn(timeout):
            connection = await self._acquire(name, timeout, end)
            async with self._use(connection, name):
                await self._learn_partials(connection, timeout, end)
                reply = _PartialReply(connection, name, self._send)
                reply.request(body)
                end = _deadline(timeout)
                while not reply.ended:
                    frames = await self._receive(connection, end)
                    if frames is None:
                        raise self._overdue(connection, timeout)
                    part = reply.parse(frames)
                    if not part:
                        continue
                    output, stderr = part
                    if stderr and on_stderr:
                        on_stderr(stderr)
                    for frame in output:
                        if frame:
                            yield frame
                    reply.grant()
                    end = _deadline(timeout)
                if reply.failure:
                    raise reply.failure

    async def _learn_partials(self, connection, timeout, end):
        """Asks the broker of a new connection whether it passes on partial replies."""
        for protocol in (CLIENT, CLIENT02):
            if connection.partials is not None:
                return
            self._send(connection, protocol, b'mmi.service', b'mmi.credit')
            connection.unanswered += 1
            answer, stood = None, False
            while answer is None and not stood:  # for PATIENCE from when the connection stands
                stood = connection.connected
                patience = time.monotonic() + PATIENCE
                answer = await self._receive(connection, patience if end is None else min(patience, end))
                if answer is None and end is not None and time.monotonic() >= end:
                    raise self._overdue(connection, timeout)
            if answer is not None:
                connection.unanswered -= 1
                connection.credit = answer[-1] == b'200'
                connection.partials = connection.credit or answer[0] == CLIENT02 or answer[:2] == [b'', CLIENT02]
        if connection.partials is None:
            connection.partials = False


class _PartialReply:
    """The reply to a stream's request: what its messages mean, and the credit that the broker gets for them."""

    def __init__(self, connection, name, send):
        self.connection, self.name, self._send = connection, name, send
        self.protocol = CLIENT02 if connection.partials else CLIENT
        self.grants = connection.credit  # the broker awaits them
        self.owed = 0         # parts that were taken and not granted
        self.asked = False    # a grant is unanswered
        self.ended = False
        self.failure = None   # a StatusError, once it has ended
        self._stderr = b''    # the last of it

    def request(self, body):
        self._send(self.connection, self.protocol, self.name, *body)
        if self.grants:
            self._grant()

    def grant(self):
        """Grants a part for one that was taken. Only one grant is on its way at a time."""
        self.owed += 1
        if self.grants and not self.asked and not self.ended:
            self._grant()

    def _grant(self):
        self.asked = True
        self.connection.unanswered += 1
        self._send(self.connection, CLIENT02, b'mmi.credit', b'%d' % self.owed)
        self.owed = 0

    def parse(self, frames):
        """Returns the frames of output and the standard error in a part, or None for another message."""
        kind, body = self._cut(frames)
        if kind is None:
            return None
        self.ended = kind == CLIENT_FINAL
        status = _status(body)
        output, stderr = ([status.stdout], status.stderr) if status else (body, b'')
        self._stderr = (self._stderr + stderr)[-STDERR_KEPT:]
        if self.ended and status and status.status != 0:
            self.failure = StatusError(status.status, b'', self._stderr)
        return output, stderr

    def _cut(self, frames):
        """Returns the kind and the body of a message, or (None, []) for the answer to a question or a grant."""
        frames = frames[1:] if frames[0] == b'' else frames
        protocol, second, third = (frames + [None] * 3)[:3]
        if protocol == self.protocol == CLIENT and second == self.name:
            return CLIENT_FINAL, frames[2:]
        if protocol == CLIENT02 == self.protocol and third == b'mmi.credit':
            self._answered(frames[3:])
            return None, []
        if protocol == CLIENT02 == self.protocol and second in (CLIENT_PARTIAL, CLIENT_FINAL):
            return second, frames[3:] if third == self.name else frames[2:]  # some brokers leave the name out
        if protocol == CLIENT and second == b'mmi.service' or protocol == CLIENT02 and self.protocol == CLIENT:
            self.connection.unanswered -= 1  # it comes late
            return None, []
        raise ProtocolError('bad reply: %r' % (frames[:4],))

    def _answered(self, answer):
        self.connection.unanswered -= 1
        self.asked = False
        self.grants = self.grants and answer == [b'200']
        if self.grants and self.owed:
            self._grant()


def _poller(waits):
    poller = zmq.Poller()
    for socket in waits:
        poller.register(socket, zmq.POLLIN)
    return poller


class AsyncBackboneClient(BackboneClient):
    """A BackboneClient for asyncio. Any number of sends may be awaited concurrently."""

    async def __aenter__(self) -> 'AsyncBackboneClient':
        self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.disconnect()

    async def send(self, service: Frame, message: Message = None,  # type: ignore[override]
                   timeout: Optional[float] = None) -> Reply:
        return await self._ask(service, message, timeout)

    def stream(self, service: Frame, message: Message = None, timeout: Optional[float] = None,  # type: ignore[override]
               on_stderr: Optional[OnStderr] = None) -> AsyncIterator[bytes]:
        """Is BackboneClient.stream for async for. aclose() takes the request back, and so does cancelling the task."""
        return self._stream(service, message, timeout, on_stderr)

    async def _wait(self, turn, seconds):
        await asyncio.wait([asyncio.wrap_future(turn)], timeout=seconds)

    async def _poll(self, waits, milliseconds):
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        end = None if milliseconds is None else time.monotonic() + milliseconds / 1000
        for socket in waits:
            loop.add_reader(socket.fd, woken.set)
        try:
            while True:
                # A descriptor only reports a change of state. Poll to find out which socket is readable.
                woken.clear()
                ready = dict(_poller(waits).poll(0))
                left = None if end is None else end - time.monotonic()
                if ready or left is not None and left <= 0:
                    await asyncio.sleep(0)  # a stream that is always ready must not keep others from running
                    return ready
                try:
                    await asyncio.wait_for(woken.wait(), left)
                except asyncio.TimeoutError:
                    pass
        finally:
            for socket in waits:
                loop.remove_reader(socket.fd)


NO_REPLY = 'on_request ended without a reply; it must call reply, or return text, bytes, or a list of them'


class BackboneService:
    """Serves requests for a name.

    Calls on_request(message, reply) for one request at a time. on_request calls reply, now or
    later, or returns the reply: a str, bytes, or a list of them. The client gets a failure if
    on_request raises an exception, or ends and leaves nothing that could call reply.
    on_request may block, because another thread sends the heartbeats.

    If on_request is a generator or an async one, or returns such an iterator, what it yields goes to
    the client as it comes, if the client takes a stream. A generator waits at yield for a client that
    is slow, and is closed if nobody awaits the reply any more.

    With several brokers it serves all of them. A request that comes while on_request has one of
    another broker is handed back.
    """

    def __init__(self, service: str, on_request: OnRequest, host: Host = None,
                 port: Port = None, broker: Broker = None, encoding: Optional[str] = 'utf-8',
                 log: Optional[Callable[[object], object]] = None,
                 key: Optional[str] = None, broker_key: Optional[str] = None) -> None:
        if isinstance(host, dict):
            options = host
            host, port, broker = options.get('host'), options.get('port'), options.get('broker')
            key, broker_key = options.get('key', key), options.get('broker_key', broker_key)
        self.service, self.on_request, self.encoding = service, on_request, encoding
        self._brokers = _addresses(host, port, broker, key, broker_key)
        self.endpoint = _join(self._brokers)
        self.log = log or (lambda text: print('%s: %s' % (service, text), file=sys.stderr))
        self._requests: Any = queue.Queue()
        self._replies: Any = queue.SimpleQueue()  # reentrant, because the collector may put a reply into it
        with _wrap(OSError, self.endpoint):
            self._wake_receiver, self._wake_sender = sockets.socketpair()
        self._wake_sender.setblocking(False)
        self._stopping = False
        self._threads: List[threading.Thread] = []

    def get_endpoint(self) -> str:
        return self.endpoint

    getEndpoint = get_endpoint

    def connect(self) -> 'BackboneService':
        """Serves in background threads. Registers as soon as the broker can be reached."""
        self._stopping = False
        self._launch()
        return self

    def _launch(self):
        for endpoint, keys in self._brokers:
            with _wrap(zmq.ZMQError, endpoint):
                _Connection(endpoint, keys, 'bservice').close()  # fails here, and not in a thread, if the endpoint is bad
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._keep_registered, self._work)]
        for thread in self._threads:
            thread.start()

    def start(self) -> None:
        """Serves until disconnect is called.

        In the main thread, SIGTERM and SIGINT (Ctrl-C) call disconnect, and a second one ends the
        program at once. A signal that is ignored or has a handler of the program is left alone.
        """
        self._stopping = False
        replaced: List[Any] = []

        def restore():
            while replaced:
                signal.signal(*replaced.pop())

        def stop(*_):
            restore()
            self.disconnect()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    replaced.append((number, signal.signal(number, stop)))
        try:
            self._launch()
            self._join()
        finally:
            restore()

    def _join(self):
        for thread in self._threads:
            while thread.is_alive():
                thread.join(1)  # with a timeout, so that signals are handled

    def disconnect(self) -> None:
        """Accepts no more requests, and sends DISCONNECT after the reply to the current one. Returns at once."""
        self._stopping = True
        self._notify()

    def close(self) -> None:
        """Disconnects, and waits until on_request has ended, unless it is on_request that calls close."""
        self.disconnect()
        if threading.current_thread() not in self._threads:
            self._join()

    def __enter__(self) -> 'BackboneService':
        return self.connect()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _notify(self):
        """Wakes the thread that owns the sockets."""
        with contextlib.suppress(BlockingIOError):  # enough to wake it is there already
            self._wake_sender.send(b'.')

    def _answer(self, request, body, last=True):
        """Sends the reply to a request: its frames, or a str that says why there is none. Or else sends a part of it."""
        request.replied = request.replied or last
        self._replies.put((request, body, last))
        self._notify()

    def _work(self):
        """Calls on_request for each request."""
        request = self._requests.get()
        while request:
            replied = self._handle(request)
            request = self._next_request(replied)

    def _next_request(self, replied):
        """Returns the next request, or None at the end. It cannot come as long as a reply is missing."""
        pause, longest = COLLECT_PAUSES
        while not replied:
            try:
                return self._requests.get(timeout=pause)
            except queue.Empty:
                gc.collect()  # perhaps only a cycle of garbage still refers to the reply function
                pause = min(2 * pause, longest)
        return self._requests.get()

    def _handle(self, request):
        """Calls on_request for a request. Returns whether it has its reply."""
        def reply(message):
            try:
                body = _frames(message)
            except UsageError as error:
                body = str(error)
            request.end()
            self._answer(request, body)
        weakref.finalize(reply, self._answer, request, NO_REPLY).atexit = False
        try:
            result = self.on_request([_decode(frame, self.encoding) for frame in request.body], reply)
            if inspect.iscoroutine(result) or isinstance(result, collections.abc.AsyncIterator):
                result = asyncio.run(self._finish(request, result))
            if isinstance(result, collections.abc.Iterator):
                result = self._send_parts(request, result)
            if not request.replied and isinstance(result, (str, bytes, bytearray, memoryview, list, tuple)):
                reply(result)
        except BaseException as error:  # such as SystemExit, which would end nothing but this thread
            self._answer(request, _failure(error))
        return request.replied

    async def _finish(self, request, result):
        """Returns what on_request has to reply in the end. Sends the parts of an asynchronous iterator."""
        if inspect.iscoroutine(result):
            result = await result
        if not isinstance(result, collections.abc.AsyncIterator):
            return result
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def cancel(_):
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(task.cancel)
        request.over.add_done_callback(cancel)
        try:
            async for part in result:
                for credit in self._send_part(request, part):
                    await asyncio.wait([asyncio.wrap_future(credit)])
        finally:
            if hasattr(result, 'aclose'):
                await result.aclose()
        return bytes(request.collected)

    def _send_parts(self, request, result):
        """Sends the parts of an iterator. Returns what is left to reply in the end."""
        try:
            for part in result:
                for credit in self._send_part(request, part):
                    concurrent.futures.wait([credit])
                if request.over.done():
                    break
        finally:
            if hasattr(result, 'close'):
                result.close()
        return bytes(request.collected)

    def _send_part(self, request, part):
        """Sends a part in pieces, or collects it. Yields a future before each piece, which the caller has to wait for."""
        data = b''.join(_frames(part))
        if not request.takes_parts:
            request.collected += data
            if len(request.collected) > MAX_COLLECTED:
                raise BackboneError('a reply of more than %d bytes, to a client that takes no stream' % MAX_COLLECTED)
            return
        for start in range(0, len(data), PART_SIZE):
            yield request.take_credit()
            if request.over.done():
                return
            self._answer(request, [data[start:start + PART_SIZE]], last=False)

    def _keep_registered(self):
        """Registers with each broker, again after each loss, until disconnect is called."""
        turns = _HandlerTurns()
        sessions = [_Session(self, turns, *broker) for broker in self._brokers]
        while True:
            while not self._replies.empty():
                reply = self._replies.get()
                for session in sessions:
                    session.reply(*reply)
            due = min([session.step() for session in sessions] + [turns.step()])
            waits = [socket for session in sessions for socket in session.waits()]
            if self._stopping and not waits:
                break
            wake = self._wake_receiver.fileno()
            if wake in dict(_poller(waits + [wake]).poll(max(0, due - time.monotonic()) * 1000 + 1)):
                self._wake_receiver.recv(4096)
        self._requests.put(None)


class _HandlerTurns:
    """Lets one session at a time have on_request. Those that had to hand a request back get their turns in that order."""

    def __init__(self):
        self._user = None  # the session that has it, or for which it is reserved
        self._until = math.inf  # the end of the reservation
        self._waiting = collections.deque()

    def take(self, session):
        """Returns whether a session may call on_request now. It then has to release it."""
        if self._user not in (None, session):
            return False
        self._user, self._until = session, math.inf
        return True

    def wait(self, session):
        self._waiting.append(session)

    def decline(self, session):
        """Ends a reservation, because the broker has no request."""
        if self._user is session and self._until != math.inf:
            self.release(session)

    def release(self, session):
        """Ends the turn of a session, the reservation for it, or its wait."""
        if self._user is session:
            self._user, self._until = None, math.inf
        with contextlib.suppress(ValueError):
            self._waiting.remove(session)

    def step(self):
        """Lets the next session register again if it is its turn. Returns when that may be the case without a release."""
        if time.monotonic() >= self._until:
            self.release(self._user)
        if self._user is None and self._waiting:
            self._user, self._until = self._waiting.popleft(), time.monotonic() + RESERVED
            self._user.register()
        return self._until


class _Request:
    """A request in progress. One thread calls on_request for it, and another has the socket."""

    def __init__(self, address, body):
        self.address, self.body = address, body  # the address with the empty frame behind it
        token = STREAM_TOKEN.fullmatch(address[0]) if len(address) == 2 else None
        self.takes_parts = bool(token)
        self.replied = False
        self.collected = bytearray()  # the parts, if the client takes none
        self.over = concurrent.futures.Future()  # is done when nobody awaits parts any more
        self._lock = threading.Lock()
        self._credit = int(token[1]) if token else 0  # parts that may be sent
        self._awaited = None  # a future of the credit for the next part

    def take_credit(self):
        """Returns a future that is done once the next part may be sent, or nobody awaits it."""
        with self._lock:
            self._awaited = future = concurrent.futures.Future()
            future.set_running_or_notify_cancel()  # so that asyncio cannot cancel it
            self._settle()
            return future

    def _settle(self):
        if self._awaited and (self._credit > 0 or self.over.done()):
            self._credit -= 1
            self._awaited.set_result(None)
            self._awaited = None

    def grant(self, number):
        with self._lock:
            self._credit += number
            self._settle()

    def end(self):
        """Tells on_request that nobody awaits parts any more."""
        if not self.over.done():
            self.over.set_result(None)
        self.grant(0)


class _Session:
    """The registrations of a service with one broker: one after another, each from READY to DISCONNECT on a new socket."""

    def __init__(self, service, turns, endpoint, keys):
        self.service, self.turns, self.endpoint, self.keys = service, turns, endpoint, keys
        self.connection = None
        self.current = None  # the _Request in progress
        self.why = None      # the registration is over; if the broker refused the service, a BackboneError
        self.due = 0.0       # when to send the next heartbeat, or to register again
        self.registered = False

    def waits(self):
        return [self.connection.socket, self.connection.monitor] if self.connection else []

    def step(self):
        """Does what is due. Returns when the next thing is."""
        try:
            if self.connection or not self.service._stopping and time.monotonic() >= self.due:
                self._serve()
        except zmq.ZMQError as error:
            self.why = self.why or error
            if not self.current:
                self._end()
        return self.due

    def register(self):
        self.registered, self.heard = True, time.monotonic()
        self._send(READY, _bytes(self.service.service))

    def reply(self, request, body, last):
        """Sends a part of the reply to a request, or the last of it, unless it is a second one, or one for another session."""
        if request is not self.current:
            return
        if last:
            self.current = None
            self.turns.release(self)
        if isinstance(body, str):
            self._log(body)
            body = _failure(StatusError(1, b'', '%s: %s\n' % (self.service.service, body)))
        if self.why and last:
            self._log('reply dropped: %s' % self.why)
        elif self.why:
            pass  # the last one follows
        elif request.takes_parts:
            self._pass_on([WORKER02, WORKER_FINAL if last else WORKER_PARTIAL] + request.address + body)
        else:
            self._send(REPLY, *request.address, *body)

    def _send(self, *frames):
        self._pass_on([b'', WORKER] + list(frames))

    def _pass_on(self, message):
        try:
            self.connection.socket.send_multipart(message, zmq.NOBLOCK)
        except zmq.Again:
            self.connection.update()
            self.why = self.why or self.connection.refused or 'the broker does not accept messages'

    def _serve(self):
        if not self.connection:
            self.why, self.due = None, 0
            self.connection = _Connection(self.endpoint, self.keys, 'bservice')
            self.connection.close.atexit = False  # a thread may use it then
            self.register()
        self.connection.update()
        self.why = self.why or self.connection.refused
        now = time.monotonic()
        if self.connection.socket.poll(0):
            self.heard = now
            self._receive(*_command(self.connection.socket.recv_multipart()))
        if self.connection.lost and self.current and self.current.takes_parts:
            self.why = self.why or 'lost the connection to the broker'
        self.connection.lost = False  # the socket connects again
        if self.why and self.current and self.current.takes_parts:
            self.current.end()
        if now >= self.due:
            self.due = now + HEARTBEAT_INTERVAL
            if self.registered and not self.why:
                self._send(HEARTBEAT)
        # Some brokers send no heartbeats to a busy worker.
        if self.registered and not self.current and now - self.heard > LIVENESS * HEARTBEAT_INTERVAL:
            self.why = 'no heartbeat from the broker'
        # Wait for the current request even if the registration is over: only one runs at a time.
        if not self.current and (self.why or self.service._stopping):
            self._end()

    def _receive(self, kind, rest):
        if kind == DISCONNECT:
            self.why = _disconnected(rest)
        elif kind == HEARTBEAT:
            self.turns.decline(self)
        elif kind == WORKER_CREDIT:
            if self.current and rest[:-1] == self.current.address and re.fullmatch(b'[0-9]{1,9}', rest[-1]):
                self.current.grant(int(rest[-1]))
        elif kind == REQUEST and b'' in rest and not self.current and self.registered:
            cut = rest.index(b'') + 1
            if self.turns.take(self):
                self.current = _Request(rest[:cut], rest[cut:])
                self.service._requests.put(self.current)
            else:
                self._send(DISCONNECT, *BUSY)
                self.registered = False
                self.turns.wait(self)

    def _end(self):
        """Ends the registration. The next one comes after a pause."""
        self.turns.release(self)
        if self.connection:
            if self.registered and not self.why:
                self._send(DISCONNECT)
            if not self.why:
                self.connection.socket.linger = 1000
            self.connection.close()
        self.connection, self.registered, self.due = None, False, math.inf
        if self.service._stopping:
            return
        if isinstance(self.why, BackboneError):
            pause = REFUSED_PAUSE
            self._log('refused: %s; trying again in %gs' % (self.why, pause))
        else:
            pause = HEARTBEAT_INTERVAL / 2  # it limits the rate if the broker keeps rejecting the service
            self._log('%s; reconnecting to %s' % (self.why, self.endpoint))
        self.due = time.monotonic() + pause

    def _log(self, text):
        """Logs a text, which names the broker if there are several."""
        named = len(self.service._brokers) == 1 or self.endpoint in text
        self.service.log(text if named else '%s: %s' % (self.endpoint, text))


def _failure(error):
    """Returns the reply for an exception in on_request."""
    if isinstance(error, StatusError):
        with contextlib.suppress(UsageError):
            return _frames([error.stdout, error.stderr, 'exit status %d' % (error.status if error.status in range(256) else 1)])
    try:
        text = '%s: %s\n' % (type(error).__name__, error)
    except Exception:
        text = '%s\n' % type(error).__name__
    return [b'', text.encode('utf-8', 'backslashreplace'), b'exit status 1']


def _disconnected(body):
    """Returns why the broker sent DISCONNECT: bbroker tells a service what its key may not."""
    if len(body) == 2 and body[0] == NOT_ALLOWED:
        reason = _text(body[1])
        return NotAllowed(reason if reason.isprintable() else repr(reason))
    return 'the broker sent DISCONNECT'


def _command(frames):
    """Returns the command of a message to a worker and the frames after it, or (None, [])."""
    # Dispatchr Backbone may omit the empty first frame.
    frames = frames[1:] if frames and frames[0] == b'' else frames
    if len(frames) < 2 or frames[0] != WORKER and (frames[0], frames[1]) != (WORKER02, WORKER_CREDIT):
        return None, []
    return frames[1], frames[2:]


class Service(BackboneService):
    """BackboneService under the name that the first README of Dispatchr Backbone uses."""


class IOLoop:
    """Stands in for the event loop of Dispatchr Backbone. Threads run the callbacks; start only waits."""

    @classmethod
    def instance(cls) -> 'IOLoop':
        return cls()

    def start(self) -> None:
        threading.Event().wait()


class CmdService(BackboneService):
    """Serves a command. Runs it with its options, followed by the frames of the request, as arguments."""

    def __init__(self, service: str, cmd: Union[str, Sequence[str]], host: Host = None,
                 port: Port = None, options: Sequence[str] = (), stdin: bool = False, broker: Broker = None,
                 key: Optional[str] = None, broker_key: Optional[str] = None) -> None:
        self.command = ([cmd] if isinstance(cmd, str) else list(cmd)) + list(options)
        self.stdin = stdin
        super().__init__(service, self._run, host, port, broker, encoding=None, key=key, broker_key=broker_key)

    def _run(self, message, reply):
        stdin = message.pop() if self.stdin and message else b''
        try:
            done = subprocess.run(self.command + message, input=stdin, capture_output=True)
        except FileNotFoundError as error:
            raise StatusError(127, b'', '%s\n' % error)
        except (OSError, ValueError) as error:
            raise StatusError(126, b'', '%s\n' % error)
        if done.returncode:
            status = done.returncode if done.returncode > 0 else 128 - done.returncode
            raise StatusError(status, done.stdout, done.stderr)
        reply(done.stdout)


# The command line.

USAGE = """usage: backbone.py request [FLAGS] NAME [ARG...]
       backbone.py service [FLAGS] NAME COMMAND [ARG...]

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
"""

TAKES_VALUE = {'--timeout', '--host', '--port', '--broker', '--broker-key', '--key'}
SHORT = {
    '-t': '--timeout', '-n': '--no-input', '-0': '--null', '-p': '--port', '-b': '--broker', '-q': '--quiet', '-h': '--help',
}
FLAGS = {
    'request': TAKES_VALUE | {'--no-input', '--null', '--stdin', '--quiet', '--help'},
    'service': TAKES_VALUE - {'--timeout'} | {'--stdin', '--quiet', '--help'},
}


def parse(verb, words):
    """Returns the flags, the name and the rest.

    Flags end at -- or at the first argument after the name.
    """
    flags, name, words = {}, None, collections.deque(words)
    while words:
        word = words.popleft()
        if word == '--':
            name = words.popleft() if name is None and words else name
            break
        if not word.startswith('-') or word == '-':
            if name is not None:
                words.appendleft(word)
                break
            name = word
            continue
        flag, equals, value = word.partition('=')
        flag = SHORT.get(flag, flag)
        if flag not in FLAGS[verb]:
            raise UsageError('unknown flag %s\nhint: put -- before an argument that looks like a flag' % word)
        if flag in TAKES_VALUE and not equals:
            if not words:
                raise UsageError('%s needs a value' % flag)
            value = words.popleft()
        flags[flag] = flags.get(flag, []) + [value] if flag == '--broker' else value
    return flags, name, list(words)


def duration(text):
    """Returns a duration in seconds."""
    units = {'h': 3600, 'm': 60, 's': 1, 'ms': 0.001, '': 1}
    number = text.rstrip('hms')
    try:
        seconds = float(number) * units[text[len(number):]]
        if 0 <= seconds < float('inf'):
            return seconds
    except (ValueError, KeyError):
        pass
    raise UsageError('%r is not a duration such as 5, 0.5 or 500ms' % text)


def place(flags):
    """Returns the arguments that tell where the broker is, and the keys."""
    given = {flag[2:].replace('-', '_'): flags.get(flag) for flag in TAKES_VALUE - {'--timeout'}}
    return dict(given, broker=[endpoint for endpoint in given['broker'] or [] if endpoint])


def request(flags, name, args):
    message = [os.fsencode(arg) for arg in args]
    separator = b'\0' if '--null' in flags else b'\n'
    if '--stdin' in flags:
        message.append(sys.stdin.buffer.read())
    elif not message and '--no-input' not in flags and sys.stdin and not sys.stdin.isatty():
        lines = sys.stdin.buffer.read()
        message = (lines[:-1] if lines.endswith(separator) else lines).split(separator) if lines else []
    client = BackboneClient(encoding=None, **place(flags))
    reply = client.send(name, message, duration(flags.get('--timeout', '30')))
    sys.stdout.buffer.write(reply if isinstance(reply, bytes) else b''.join(frame + separator for frame in reply))
    sys.stdout.flush()


def service(flags, name, command):
    if not command:
        raise UsageError('no command for %s' % name)
    served = CmdService(name, command, stdin='--stdin' in flags, **place(flags))
    if '--quiet' in flags:
        served.log = lambda text: None
    served.start()


class Signalled(BaseException):
    pass


def main(argv):
    verb, words = (argv[1:2] or [''])[0], argv[2:]
    tool = 'backbone.py'
    try:
        if verb in ('-h', '--help'):
            sys.stdout.write(USAGE)
            return 0
        if verb not in FLAGS:
            raise UsageError('the first argument must be request or service\nhint: backbone.py --help')
        flags, name, rest = parse(verb, words)
        if '--help' in flags:
            sys.stdout.write(USAGE)
            return 0
        if not name:
            raise UsageError('no service name')
        if verb == 'service':
            service(flags, name, rest)
            return 0

        def interrupt(number, _):
            raise Signalled(number)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        request(flags, name, rest)
        return 0
    except Signalled as signalled:
        number = signalled.args[0]
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    except StatusError as error:
        sys.stdout.buffer.write(error.stdout)
        sys.stdout.flush()
        sys.stderr.buffer.write(error.stderr)
        return error.status
    except UsageError as error:
        for line in str(error).split('\n'):
            print('%s: %s' % (tool, line), file=sys.stderr)
        return 64
    except BackboneError as error:
        print('%s: %s: %s' % (tool, name, error), file=sys.stderr)
        return error.status
    except OSError as error:
        print('%s: %s' % (tool, error), file=sys.stderr)
        return 74


if __name__ == '__main__':
    sys.exit(main(sys.argv))
