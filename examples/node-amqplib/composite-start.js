// Sends one composite start request with amqplib and prints the reply. To lift into a program of your own: all but `main`.

import { randomUUID } from "node:crypto";
import { readFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import amqp from "amqplib";

// Direct reply-to leaves no queue behind. A reply is lost with its connection, as it would be with an exclusive queue:
// the request is then sent again, and gets the same reply.
const REPLY_TO = "amq.rabbitmq.reply-to";
const CONNECT_MS = 3000;
const CLOSE_MS = 300;
const HEARTBEAT_SECONDS = 5;
const FIRST_PAUSE_MS = 100;
const LONGEST_PAUSE_MS = 2000;

/** The work may be done all the same. Sent again under its message id, the request gets the answer that is missing. */
class NoAnswer extends Error {}

/** An address that is none, or a text that AMQP cannot carry, stays so. */
const NOT_WORTH_ANOTHER_TRY = [NoAnswer, TypeError, RangeError];

/**
 * Sends the request until it is answered, always under this message id, for so many seconds at most.
 * @returns {Promise<{status: number, location?: string, body: Buffer}>} status 200, or that of a refusal
 */
async function request(url, queue, body, messageId, seconds) {
  const properties = {
    messageId, correlationId: randomUUID(), replyTo: REPLY_TO,
    contentType: "application/json", persistent: true, mandatory: true,
  };
  const late = sleep(seconds * 1000, null, { ref: false }).then(() => {
    throw new NoAnswer(`no answer in ${seconds} s: is a worker running on this queue?`);
  });
  for (let pause = FIRST_PAUSE_MS; ; pause = Math.min(2 * pause, LONGEST_PAUSE_MS)) {
    try {
      return await ask(url, queue, body, properties, late);
    } catch (error) {
      if (NOT_WORTH_ANOTHER_TRY.some((kind) => error instanceof kind)) throw error;
      console.error(`trying again: ${error.message}`);
    }
    // Clients that were cut off together come back one by one.
    await Promise.race([sleep(pause * (0.5 + Math.random() / 2)), late]);
  }
}

async function ask(url, queue, body, properties, late) {
  const address = new URL(url);
  address.searchParams.set("heartbeat", HEARTBEAT_SECONDS);
  const connecting = amqp.connect(address.href, { timeout: CONNECT_MS });
  const answered = connecting.then((connection) =>
    Promise.race([lost(connection), exchange(connection, queue, body, properties)]),
  );
  try {
    return await Promise.race([answered, late]);
  } finally {
    // A connection that comes too late is closed, too; a broker gone silent is not waited for.
    const closed = connecting.then((connection) => connection.close()).catch(() => {});
    await Promise.race([closed, sleep(CLOSE_MS)]);
  }
}

function lost(connection) {
  return new Promise((_, reject) => {
    connection.on("error", reject);
    connection.on("close", () => reject(new Error("the connection was lost before the reply came")));
  });
}

async function exchange(connection, queue, body, properties) {
  const channel = await connection.createConfirmChannel();
  return new Promise((resolve, reject) => {
    const onReply = (reply) => {
      // Any other correlation id is not for this request.
      if (reply?.properties.correlationId !== properties.correlationId) return;
      const { status, location } = reply.properties.headers;
      resolve({ status, location, body: reply.content });
    };
    channel.on("error", (error) => reject(new NoAnswer(`no answer: ${error.message}`)));
    channel.on("return", () => reject(new NoAnswer(`no answer: ${queue}: no such queue: has a worker been started?`)));
    channel.consume(REPLY_TO, onReply, { noAck: true }).catch(reject);
    channel.publish("", queue, body, properties, (error) => error && reject(error)); // called with the broker's confirm
  });
}

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      "message-id": { type: "string", default: randomUUID() },
      queue: { type: "string", default: "composite.start" },
      timeout: { type: "string", default: "30" },
    },
  });
  const url = process.env.AMQP_URL ?? "amqp://guest:guest@127.0.0.1:5672/%2f";
  const body = await readFile(positionals[0] ?? "../composite-start.json");
  console.error(`message id: ${values["message-id"]}`);
  const reply = await request(url, values.queue, body, values["message-id"], Number(values.timeout));
  console.error(`status: ${reply.status}`);
  if (reply.location) console.error(`location: ${reply.location}`);
  console.log(reply.body.toString());
  if (reply.status === 500) {
    console.error("the worker failed, and the request is a dead letter now: tell those who run it");
  }
  return reply.status === 200 ? 0 : 1;
}

process.exit(await main().catch((error) => {
  console.error(error.message);
  return error instanceof NoAnswer ? 3 : 2;
}));
