#!/bin/sh
# Sends one composite start request to the gateway with curl and prints the answer.
set -eu

url=${GATEWAY_URL:-http://127.0.0.1:8080}/genesys/1/cs/services_composite/start
connect_seconds=3 longest_pause_seconds=4

main() {
  file=../composite-start.json message_id='' timeout=30
  while [ $# -gt 0 ]; do
    case $1 in
      --message-id) message_id=${2?--message-id ID} && shift 2 ;;
      --timeout) timeout=${2?--timeout SECONDS} && shift 2 ;;
      *) file=$1 && shift ;;
    esac
  done
  [ -r "$file" ] || { echo "$file: cannot be read" >&2 && exit 2; }
  [ "$message_id" ] || message_id=$(cat /proc/sys/kernel/random/uuid)
  echo "message id: $message_id" >&2
  answer=$(mktemp -d)
  trap 'rm -rf "$answer"' EXIT
  ask_until_answered
}

# The deadline is over all attempts, and all of them have one key: what was done already is answered as it was then.
ask_until_answered() {
  deadline=$(($(date +%s) + timeout)) pause=1
  while left=$((deadline - $(date +%s))) && [ "$left" -gt 0 ]; do
    status=$(ask 2>"$answer/error") || status=none
    case $status in
      none) echo "trying again: $(cat "$answer/error")" >&2 ;;
      # No broker, no worker, or no answer yet. All other refusals would be the same next time.
      502 | 503 | 504) echo "trying again: $status $(cat "$answer/body")" >&2 ;;
      *) print_answer ;;
    esac
    sleep "$pause"
    pause=$((pause * 2 < longest_pause_seconds ? pause * 2 : longest_pause_seconds))
  done
  echo "no answer in $timeout s: are a gateway and a worker running?" >&2
  exit 3
}

ask() {
  curl --silent --show-error --connect-timeout "$connect_seconds" --max-time "$left" \
    --header "Content-Type: application/json" --header "Idempotency-Key: $message_id" --data-binary "@$file" \
    --dump-header "$answer/head" --output "$answer/body" --write-out '%{http_code}' "$url"
}

print_answer() {
  echo "status: $status" >&2
  sed -n 's/^[Ll]ocation: \(.*\)\r$/location: \1/p' "$answer/head" >&2
  cat "$answer/body" && echo
  [ "$status" != 500 ] || echo "the worker failed, and the request is a dead letter now: tell those who run it" >&2
  [ "$status" = 200 ] || exit 1
  exit 0
}

main "$@"
