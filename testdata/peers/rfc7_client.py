"""A client written from RFC 7, with a REQ socket. It prints each frame of the reply.
Usage: rfc7_client.py ENDPOINT SERVICE [FRAME...]"""
import sys

import zmq

endpoint, service, *body = sys.argv[1:]
socket = zmq.Context().socket(zmq.REQ)
socket.connect(endpoint)
socket.send_multipart([b'MDPC01', service.encode()] + [frame.encode() for frame in body])
protocol, served, *reply = socket.recv_multipart()
assert protocol == b'MDPC01' and served == service.encode()
for frame in reply:
    print(frame.decode())
