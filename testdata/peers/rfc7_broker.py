"""A broker written from RFC 7. The address of a client is one frame, there is no MMI, and only
idle workers get heartbeats. Usage: rfc7_broker.py ENDPOINT"""
import sys
import time

import zmq

socket = zmq.Context().socket(zmq.ROUTER)
socket.bind(sys.argv[1])
workers = {}  # identity: [service, busy, time of its last message]
queue = []    # (service, client, body)
beat = time.time()

while True:
    if socket.poll(100):
        sender, empty, protocol, *rest = socket.recv_multipart() + [b''] * 2
        rest = rest[:-2]
        if empty != b'':
            continue
        if protocol == b'MDPC01' and rest:
            queue.append((rest[0], sender, rest[1:]))
        elif protocol == b'MDPW01' and rest[0] == b'\1':
            workers[sender] = [rest[1], False, time.time()]
        elif protocol == b'MDPW01' and sender not in workers:
            socket.send_multipart([sender, b'', b'MDPW01', b'\5'])
        elif protocol == b'MDPW01':
            workers[sender][2] = time.time()
            if rest[0] == b'\5':
                del workers[sender]
            elif rest[0] == b'\3':
                assert rest[2] == b''
                workers[sender][1] = False
                socket.send_multipart([rest[1], b'', b'MDPC01', workers[sender][0]] + rest[3:])
    now = time.time()
    for identity, (service, busy, heard) in list(workers.items()):
        if not busy and now - heard > 7.5:
            del workers[identity]
            continue
        request = next((r for r in queue if r[0] == service), None)
        if not busy and request:
            queue.remove(request)
            workers[identity][1] = True
            socket.send_multipart([identity, b'', b'MDPW01', b'\2', request[1], b''] + request[2])
        elif not busy and now - beat > 2.5:
            socket.send_multipart([identity, b'', b'MDPW01', b'\4'])
    if now - beat > 2.5:
        beat = now
