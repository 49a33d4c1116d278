"""Sends the requests of its input with backbone.py, all at once, and prints what comes.

A line of JSON each, with bytes in hexadecimal: {"service", "message", "timeout"}, and
{"reply"} or {"error", "status", "stdout", "stderr"}.
"""
import asyncio
import json
import sys

from backbone import AsyncBackboneClient, BackboneClient, BackboneError


def tell(ask):
    try:
        reply = ask()
    except BackboneError as error:
        return failure(error)
    return success(reply)


def success(reply):
    return {'reply': [frame.hex() for frame in (reply if isinstance(reply, list) else [reply])]}


def failure(error):
    told = {'error': type(error).__name__, 'status': error.status}
    if hasattr(error, 'stdout'):
        told.update(stdout=error.stdout.hex(), stderr=error.stderr.hex())
    return told


async def at_once(requests):
    client = AsyncBackboneClient(encoding=None)

    async def send(service, message, timeout):
        try:
            return success(await client.send(service, message, timeout))
        except BackboneError as error:
            return failure(error)
    told = await asyncio.gather(*[send(*request) for request in requests])
    client.disconnect()
    return told


requests = []
for line in sys.stdin:
    r = json.loads(line)
    requests.append((r['service'], [bytes.fromhex(frame) for frame in r['message']], r['timeout']))
if sys.argv[1:] == ['asyncio']:
    answers = asyncio.run(at_once(requests))
else:
    with BackboneClient(encoding=None) as client:
        answers = [tell(lambda: client.send(*request)) for request in requests]
for answer in answers:
    print(json.dumps(answer))
