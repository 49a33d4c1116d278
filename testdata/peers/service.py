"""A service written with backbone.py. The first frame of a request says what it does."""
import signal
import sys
import threading
import time

from backbone import BackboneService, StatusError


def on_request(message, reply):
    wish = message[0] if message else b''
    if wish == b'fail':
        raise StatusError(3, b'out\xff', b'err\n')
    if wish == b'throw':
        raise ValueError('boom')
    if wish == b'late' and len(message) > 1:  # reply when somebody opens the FIFO message[1]
        threading.Thread(target=lambda: (open(message[1]).close(), reply(b'late'))).start()
    elif wish == b'late':  # reply from another thread
        threading.Timer(0.6, reply, [[b'late']]).start()
    elif wish == b'twice':
        reply(b'first')
        time.sleep(0.3)  # until the next request is in progress
        reply(b'second')
    elif wish == b'block':
        end = time.monotonic() + float(message[1])
        while time.monotonic() < end:
            pass
        reply(b'blocked')
    else:
        reply(message)


service = BackboneService(sys.argv[1], on_request, encoding=None)
signal.signal(signal.SIGTERM, lambda *_: service.disconnect())
service.start()
