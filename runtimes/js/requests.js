/* What the runtimes `node` and `chromium` ask of an opened model, and how it is answered.
 *
 * A message both ways is a uint32 (little-endian) n, n bytes of JSON, and `bytes` bytes more if the JSON has that key.
 *     { op: 'run', bytes }           inputs in signature order      -> { bytes }, outputs in signature order
 *     { op: 'time', warmup, runs }   on the inputs that are set     -> { seconds: [...], memory }
 * Whatever fails is answered with { error }.
 */
const SHORTEST = 4; // milliseconds: a browser's clock is coarse, shorter runs are timed several together

/* The message of a header and byte arrays behind it. */
export function message(header, ...parts) {
  const bytes = parts.reduce((sum, part) => sum + part.byteLength, 0);
  const text = new TextEncoder().encode(JSON.stringify(parts.length ? { ...header, bytes } : header));
  const whole = new Uint8Array(4 + text.length + bytes);
  new DataView(whole.buffer).setUint32(0, text.length, true);
  whole.set(text, 4);
  let offset = 4 + text.length;
  for (const part of parts) {
    whole.set(new Uint8Array(part.buffer, part.byteOffset, part.byteLength), offset);
    offset += part.byteLength;
  }
  return whole;
}

/* The answer to `request` with `payload` (bytes or null). `arrays`: model.js's ARRAYS. */
export function answer(model, arrays, request, payload) {
  try {
    return request.op === 'run' ? run(model, arrays, payload) : time(model, request);
  } catch (error) {
    return message({ error: error.message });
  }
}

function run(model, arrays, payload) {
  let offset = payload.byteOffset;
  const feeds = {};
  for (const { name, shape, dtype } of model.inputs) {
    const size = shape.reduce((a, b) => a * b, 1) * arrays[dtype].BYTES_PER_ELEMENT;
    feeds[name] = new arrays[dtype](payload.buffer.slice(offset, offset + size));
    offset += size;
  }
  const outputs = model.run(feeds);
  return message({}, ...model.outputs.map(({ name }) => outputs[name]));
}

function time(model, { warmup, runs }) {
  const clock = (count) => {
    const start = performance.now();
    for (let i = 0; i < count; i++) model.step();
    return performance.now() - start;
  };
  let together = 1;
  for (let i = 0; i < warmup; i++) {
    const taken = clock(together);
    if (taken < SHORTEST) together = Math.ceil((together * SHORTEST) / Math.max(taken, 0.1));
  }
  const seconds = Array.from({ length: runs }, () => clock(together) / together / 1e3);
  return message({ seconds, memory: model.bytes });
}
