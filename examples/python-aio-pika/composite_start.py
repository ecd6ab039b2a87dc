"""Sends one composite start request with aio-pika and prints the reply. To lift into a program of your own: all but `main`."""

import argparse
import asyncio
import logging
import os
import random
import sys
import uuid
from pathlib import Path
from typing import NamedTuple

import aio_pika
from aio_pika.exceptions import AMQPConnectionError, AMQPError, DeliveryError, PublishError

# Direct reply-to leaves no queue behind. A reply is lost with its connection, as it would be with an exclusive queue:
# the request is then sent again, and gets the same reply.
REPLY_TO = "amq.rabbitmq.reply-to"
CONNECT_SECONDS, HEARTBEAT_SECONDS = 3, 5
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 2


class Reply(NamedTuple):
    status: int  # 200, or that of a refusal
    location: str | None
    body: bytes


class NoAnswer(Exception):
    """The work may be done all the same. Sent again under its message id, the request gets the answer that is missing."""


async def request(url: str, queue: str, body: bytes, message_id: str, timeout: float) -> Reply:
    """Sends the request until it is answered, always under this message id, for `timeout` seconds at most."""
    message = aio_pika.Message(
        body, message_id=message_id, correlation_id=str(uuid.uuid4()), reply_to=REPLY_TO,
        content_type="application/json", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
    asking = asyncio.create_task(ask_until_answered(url, queue, message))
    try:
        # Not asyncio.timeout, which would wait for the connection to close: a broker gone silent draws that out.
        await asyncio.wait([asking], timeout=timeout)
        if not asking.done():
            raise NoAnswer(f"no answer in {timeout:g} s: is a worker running on this queue?")
        return asking.result()
    except AMQPError as error:
        raise NoAnswer(f"no answer: {error!r}") from error
    finally:
        asking.cancel()


async def ask_until_answered(url: str, queue: str, message: aio_pika.Message) -> Reply:
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            return await ask(url, queue, message)
        except (AMQPConnectionError, DeliveryError, OSError) as error:
            print(f"trying again: {error!r}", file=sys.stderr)
        await asyncio.sleep(pause * random.uniform(0.5, 1))  # clients that were cut off together come back one by one
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


async def ask(url: str, queue: str, message: aio_pika.Message) -> Reply:
    answer = asyncio.get_running_loop().create_future()

    async def on_reply(reply: aio_pika.abc.AbstractIncomingMessage) -> None:
        # Any other correlation id is not for this request.
        if reply.correlation_id == message.correlation_id and not answer.done():
            answer.set_result(Reply(reply.headers["status"], reply.headers.get("location"), reply.body))

    # Not connect_robust: it would bring back the connection, yet not the reply that was lost with it.
    async with await aio_pika.connect(url, timeout=CONNECT_SECONDS, heartbeat=HEARTBEAT_SECONDS) as connection:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        await (await channel.get_queue(REPLY_TO, ensure=False)).consume(on_reply, no_ack=True)
        try:
            await channel.default_exchange.publish(message, routing_key=queue, mandatory=True)
        except PublishError:
            raise NoAnswer(f"no answer: {queue}: no such queue: has a worker been started?") from None
        await asyncio.wait([answer, channel.closed()], return_when=asyncio.FIRST_COMPLETED)
    if not answer.done():
        raise ConnectionError("the connection was lost before the reply came")
    return answer.result()


async def main() -> int:
    options = argparse.ArgumentParser(description="Sends one composite start request and prints the reply.")
    options.add_argument("file", type=Path, nargs="?", default="../composite-start.json", help="the request's body")
    options.add_argument("--message-id", default=str(uuid.uuid4()), help="names the request; made up unless given")
    options.add_argument("--queue", default="composite.start")
    options.add_argument("--timeout", type=float, default=30, metavar="SECONDS")
    given = options.parse_args()
    for library in ("aio_pika", "aiormq"):
        logging.getLogger(library).addHandler(logging.NullHandler())  # they log what they also raise
    url = os.environ.get("AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/%2f")
    try:
        body = given.file.read_bytes()
    except OSError as error:
        options.error(str(error))
    print(f"message id: {given.message_id}", file=sys.stderr)
    try:
        reply = await request(url, given.queue, body, given.message_id, given.timeout)
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
    sys.exit(asyncio.run(main()))
