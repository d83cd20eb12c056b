/* What the runtime `node` starts: opens the artifact in argv[2] and answers the requests on stdin, in order, on stdout. */
import { readSync, writeSync } from 'node:fs';
import { pathToFileURL } from 'node:url';

import { answer, message } from './requests.js';

function again(call) {
  for (;;) {
    try {
      return call();
    } catch (error) {
      if (error.code !== 'EAGAIN') throw error;
    }
  }
}

function receive(count) {
  const buffer = new Uint8Array(count);
  for (let have = 0; have < count; ) {
    const more = again(() => readSync(0, buffer, have, count - have, null));
    if (more === 0) process.exit(0);
    have += more;
  }
  return buffer;
}

function send(bytes) {
  for (let done = 0; done < bytes.byteLength; ) done += again(() => writeSync(1, bytes, done));
}

let model, arrays;
try {
  const folder = pathToFileURL(`${process.argv[2]}/`);
  const module = await import(new URL('model.js', folder));
  [model, arrays] = [await module.load(folder), module.ARRAYS];
} catch (error) {
  send(message({ error: error.message }));
  process.exit(1);
}
send(message({ ready: true }));
for (;;) {
  const size = new DataView(receive(4).buffer).getUint32(0, true);
  const request = JSON.parse(new TextDecoder().decode(receive(size)));
  send(answer(model, arrays, request, request.bytes === undefined ? null : receive(request.bytes)));
}
