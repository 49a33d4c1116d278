"""Sends the requests on standard input with backbone.py and prints the results.

A request is a line of JSON, {"service", "message", "timeout"}, and so is a result, {"reply"} or
{"error", "status", "stdout", "stderr"}. Bytes are in hexadecimal. With the argument asyncio the
requests are concurrent.
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
