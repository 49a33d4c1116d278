"""A service that streams, written with backbone.py. The first frame of a request says what it yields.

The second one names a file, to which it appends a line for each part before it yields it, and a last one when it ends.
"""
import asyncio
import sys

from backbone import BackboneService, StatusError


def numbers(note, count, gate=None):
    try:
        for number in range(int(count)):
            note(number)
            yield '%d\n' % number
            if gate and number == 0:
                open(gate).close()  # waits until somebody opens the FIFO
    finally:
        note('closed')


async def async_numbers(note, count):
    try:
        for number in range(int(count)):
            note(number)
            yield '%d\n' % number
            await asyncio.sleep(0)
    finally:
        note('closed')


async def hang(note):
    try:
        yield 'one'
        await asyncio.Event().wait()
    finally:
        note('closed')


def fail(note):
    yield ['o', b'', 'ut']
    yield ''
    raise StatusError(3, b'rest', b'err\n')


def bytes_(note, size):
    yield b'x' * int(size)


def plain(note, *frames):
    return list(frames)


def on_request(message, reply):
    kind, file, *args = message

    def note(line):
        with open(file, 'a') as out:
            out.write('%s\n' % line)
    return kinds[kind](note, *args)


kinds = {'numbers': numbers, 'async': async_numbers, 'hang': hang, 'fail': fail, 'bytes': bytes_, 'plain': plain}
BackboneService(sys.argv[1], on_request).start()
