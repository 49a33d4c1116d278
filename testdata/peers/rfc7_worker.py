"""A worker written from RFC 7. It replies with the body of the request after SECONDS, and sends no
heartbeats while it is busy. Usage: rfc7_worker.py ENDPOINT SERVICE SECONDS"""
import sys
import time

import zmq

endpoint, service, seconds = sys.argv[1], sys.argv[2].encode(), float(sys.argv[3])
socket = zmq.Context().socket(zmq.DEALER)
socket.connect(endpoint)
socket.send_multipart([b'', b'MDPW01', b'\1', service])
while True:
    if socket.poll(500):
        empty, protocol, command, *rest = socket.recv_multipart()
        assert empty == b'' and protocol == b'MDPW01'
        if command == b'\2':
            client, empty, *body = rest
            assert empty == b''
            time.sleep(seconds)
            socket.send_multipart([b'', b'MDPW01', b'\3', client, b''] + body)
        elif command == b'\5':
            socket.send_multipart([b'', b'MDPW01', b'\1', service])
    socket.send_multipart([b'', b'MDPW01', b'\4'])
