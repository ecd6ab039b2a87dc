"""Sends one composite start request with pika and prints the reply. To lift into a program of your own: all but `main`."""

import argparse
import os
import random
import sys
import threading
import time
import uuid
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import pika
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPConnectionError, AMQPError, NackError, UnroutableError

# Direct reply-to leaves no queue behind. A reply is lost with its connection, as it would be with an exclusive queue:
# the request is then sent again, and gets the same reply.
REPLY_TO = "amq.rabbitmq.reply-to"
CONNECT_SECONDS, HEARTBEAT_SECONDS = 3, 5
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 2
WORTH_ANOTHER_TRY = (AMQPConnectionError, AMQPConnectorException, NackError, OSError)


class Reply(NamedTuple):
    status: int  # 200, or that of a refusal
    location: str | None
    body: bytes


class NoAnswer(Exception):
    """The work may be done all the same. Sent again under its message id, the request gets the answer that is missing."""


def request(url: str, queue: str, body: bytes, message_id: str, timeout: float) -> Reply:
    """Sends the request until it is answered, always under this message id, for `timeout` seconds at most."""
    properties = pika.BasicProperties(
        message_id=message_id, correlation_id=str(uuid.uuid4()), reply_to=REPLY_TO,
        content_type="application/json", delivery_mode=pika.DeliveryMode.Persistent)
    deadline, answer = time.monotonic() + timeout, Future()

    def work():
        try:
            answer.set_result(ask_until(deadline, url, queue, body, properties))
        except Exception as error:
            answer.set_exception(error)

    # Most of pika's calls take no limit, so they are made in a thread that can be left behind in one.
    threading.Thread(target=work, daemon=True).start()
    try:
        return answer.result(timeout)
    except TimeoutError:
        raise NoAnswer(f"no answer in {timeout:g} s: is a worker running on this queue?") from None
    except AMQPError as error:
        raise NoAnswer(f"no answer: {error!r}") from error


def ask_until(deadline: float, *message) -> Reply:
    pause = FIRST_PAUSE_SECONDS
    while time.monotonic() < deadline:
        try:
            if reply := ask(deadline, *message):
                return reply
        except WORTH_ANOTHER_TRY as error:
            print(f"trying again: {error!r}", file=sys.stderr)
            time.sleep(pause * random.uniform(0.5, 1))  # clients that were cut off together come back one by one
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
    raise TimeoutError


def ask(deadline: float, url: str, queue: str, body: bytes, properties: pika.BasicProperties) -> Reply | None:
    parameters, replies = pika.URLParameters(url), []
    parameters.socket_timeout = parameters.stack_timeout = CONNECT_SECONDS
    parameters.heartbeat = HEARTBEAT_SECONDS

    def on_reply(_channel, _method, reply, reply_body):
        if reply.correlation_id == properties.correlation_id:  # any other is not for this request
            replies.append(Reply(reply.headers["status"], reply.headers.get("location"), reply_body))

    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        channel.basic_consume(REPLY_TO, on_reply, auto_ack=True)
        try:
            channel.basic_publish("", queue, body, properties, mandatory=True)  # and waits for the broker's confirm
        except UnroutableError:
            raise NoAnswer(f"no answer: {queue}: no such queue: has a worker been started?") from None
        while not replies and time.monotonic() < deadline:
            connection.process_data_events(time_limit=max(0, deadline - time.monotonic()))
    return replies[0] if replies else None


def main() -> int:
    options = argparse.ArgumentParser(description="Sends one composite start request and prints the reply.")
    options.add_argument("file", type=Path, nargs="?", default="../composite-start.json", help="the request's body")
    options.add_argument("--message-id", default=str(uuid.uuid4()), help="names the request; made up unless given")
    options.add_argument("--queue", default="composite.start")
    options.add_argument("--timeout", type=float, default=30, metavar="SECONDS")
    given = options.parse_args()
    url = os.environ.get("AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/%2f")
    try:
        body = given.file.read_bytes()
    except OSError as error:
        options.error(str(error))
    print(f"message id: {given.message_id}", file=sys.stderr)
    try:
        reply = request(url, given.queue, body, given.message_id, given.timeout)
    except NoAnswer as error:
        print(error, file=sys.stderr)
        return 3
    print(f"status: {reply.status}", file=sys.stderr)
    if reply.location:
        print(f"location: {reply.location}", file=sys.stderr)
    print(reply.body.decode())
    if reply.status == 500:
        print("the worker failed, and the request is a dead letter now: tell those who run it", file=sys.stderr)
    return 0 if reply.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
