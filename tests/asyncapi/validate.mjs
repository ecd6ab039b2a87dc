// The diagnostics of AsyncAPI's parser for the file named, one line each; ends with 1 if there are any.
import { readFileSync } from 'node:fs';
import { Parser } from '@asyncapi/parser';

// It would have the newest minor version, which not every tool reads.
const accepted = new Set(['asyncapi-latest-version']);

const [, , file] = process.argv;
const { document, diagnostics } = await new Parser().parse(readFileSync(file, 'utf8'));
const objections = diagnostics.filter(({ code }) => !accepted.has(code));
for (const { code, path, message, range } of objections) {
  console.log(`${file}:${range.start.line + 1}: ${path.join('.')}: ${message} (${code})`);
}
process.exitCode = document && objections.length === 0 ? 0 : 1;
