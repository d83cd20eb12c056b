/* What the runtime `node` talks to: opens the artifact in argv[2] and answers requests on stdin, in order, on stdout.
 *
 * A message both ways is a uint32 (little-endian) n, n bytes of JSON, and `bytes` bytes more if the JSON has that key.
 *     { op: 'run', bytes }           inputs in signature order      -> { bytes }, outputs in signature order
 *     { op: 'time', warmup, runs }   on the inputs that are set     -> { seconds: [...], memory }
 * Whatever fails is answered with { error }.
 */
import { readSync, writeSync } from 'node:fs';
import { pathToFileURL } from 'node:url';

function receive(count) {
  const buffer = Buffer.alloc(count);
  for (let have = 0; have < count; ) {
    const more = retry(() => readSync(0, buffer, have, count - have, null));
    if (more === 0) process.exit(have ? 1 : 0);
    have += more;
  }
  return buffer;
}

function retry(call) {
  for (;;) {
    try {
      return call();
    } catch (error) {
      if (error.code !== 'EAGAIN') throw error;
    }
  }
}

function send(header, ...parts) {
  const text = Buffer.from(JSON.stringify(header));
  const size = Buffer.alloc(4);
  size.writeUInt32LE(text.length);
  for (const part of [size, text, ...parts]) {
    for (let done = 0; done < part.byteLength; ) done += retry(() => writeSync(1, part, done));
  }
}

const bytesOf = (array) => new Uint8Array(array.buffer, array.byteOffset, array.byteLength);

function run(model, types, raw) {
  let offset = 0;
  const feeds = {};
  for (const { name, shape, dtype } of model.inputs) {
    const size = shape.reduce((a, b) => a * b, 1) * types[dtype].BYTES_PER_ELEMENT;
    feeds[name] = new types[dtype](raw.buffer.slice(raw.byteOffset + offset, raw.byteOffset + offset + size));
    offset += size;
  }
  const outputs = Object.values(model.run(feeds)).map(bytesOf);
  send({ bytes: outputs.reduce((sum, part) => sum + part.byteLength, 0) }, ...outputs);
}

function time(model, { warmup, runs }) {
  const seconds = [];
  for (let i = -warmup; i < runs; i++) {
    const start = performance.now();
    model.step();
    if (i >= 0) seconds.push((performance.now() - start) / 1e3);
  }
  send({ seconds, memory: model.bytes });
}

let model, types;
try {
  const folder = pathToFileURL(`${process.argv[2]}/`);
  const { ARRAYS, load } = await import(new URL('model.js', folder));
  [model, types] = [await load(folder), ARRAYS];
  send({ ready: true });
} catch (error) {
  send({ error: error.message });
  process.exit(1);
}
for (;;) {
  const request = JSON.parse(receive(receive(4).readUInt32LE()).toString());
  const payload = request.bytes === undefined ? null : receive(request.bytes);
  try {
    if (request.op === 'run') run(model, types, payload);
    else time(model, request);
  } catch (error) {
    send({ error: error.message });
  }
}
