"""Reads streams with backbone.py, as the lines of standard input say, and prints a line for each.

stream is followed by JSON, the arguments of stream; next takes a part, all takes the others, and leave ends a
stream early. With the argument asyncio, the client is that for asyncio.
"""
import asyncio
import json
import sys

from backbone import AsyncBackboneClient, BackboneClient, BackboneError

stderr = []
END = b'(end)'


def tell(parts):
    text = b''.join(parts)
    print(json.dumps([text.decode('latin-1'), b''.join(stderr).decode('latin-1')]), flush=True)
    stderr.clear()


def fail(error):
    print(json.dumps([type(error).__name__, error.status, getattr(error, 'stderr', b'').decode()]), flush=True)


async def main(anext, aclose, client):
    parts, loop = None, asyncio.get_running_loop()
    while True:
        line = await loop.run_in_executor(None, sys.stdin.readline)
        verb, _, rest = line.strip().partition(' ')
        if not verb:
            break
        try:
            if verb == 'stream':
                parts = client.stream(*json.loads(rest), on_stderr=stderr.append)
            elif verb == 'next':
                tell([await anext(parts)])
            elif verb == 'leave':
                await aclose(parts)
                tell([b'left'])
            else:
                got = []
                while got[-1:] != [END]:
                    got.append(await anext(parts))
                tell(got[:-1])
        except BackboneError as error:
            fail(error)


async def next_of_async(parts):
    try:
        return await parts.__anext__()
    except StopAsyncIteration:
        return END


async def next_of(parts):
    return next(parts, END)


async def close(parts):
    parts.close()


if sys.argv[1:] == ['asyncio']:
    asyncio.run(main(next_of_async, lambda parts: parts.aclose(), AsyncBackboneClient()))
else:
    asyncio.run(main(next_of, close, BackboneClient()))
