/* Runs one compiled model, in a browser or in Node: an ES module without dependencies.
 *
 *     const model = await load(new URL('mobilenet.sparsec/', import.meta.url));
 *     const { logits } = model.run({ input: new Float32Array(3 * 224 * 224) });
 *     model.close();
 *
 * A model is used by one caller at a time; `run` blocks, so a page with long models calls it in a worker. Errors are
 * `SparsecError`s of one line.
 */

export class SparsecError extends Error {
  constructor(message) {
    super(message);
    this.name = 'SparsecError';
  }
}

/* The smallest modules with an instruction of the feature: an engine without it refuses them. */
const PROBES = {
  simd128: [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65, 0, 253, 15, 11],
  'relaxed-simd': [
    0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 19, 1, 17, 0, 65, 0, 253, 15, 65, 0, 253, 15, 65,
    0, 253, 15, 253, 133, 2, 11,
  ],
};

/* How an element type is handed over. */
export const ARRAYS = {
  float32: Float32Array, float64: Float64Array, float16: Uint16Array, int8: Int8Array, uint8: Uint8Array,
  bool: Uint8Array, int16: Int16Array, uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array,
  int64: BigInt64Array, uint64: BigUint64Array,
};

const SCHEMA = 1; // of manifest.json
const ALIGNMENT = 64; // bytes: the runtime copies weights that start elsewhere
const INFO_BYTES = 96; // sparsec_tensor_info on a 32-bit machine, its `bytes` at 80
const INFO_SIZE = 80;

/* The features of `needed` that this engine lacks. */
export function missingFeatures(needed) {
  return needed.filter((name) => !(name in PROBES) || !WebAssembly.validate(new Uint8Array(PROBES[name])));
}

/* Opens the artifact in the folder `url` (default: where this file is). Raises SparsecError. */
export async function load(url = new URL('.', import.meta.url)) {
  const folder = new URL(url, globalThis.location?.href ?? import.meta.url);
  if (!folder.pathname.endsWith('/')) folder.pathname += '/';
  const manifest = parse(await read(new URL('manifest.json', folder)), folder);
  if (manifest.schema !== SCHEMA) {
    throw new SparsecError(`manifest.json has schema ${manifest.schema}, this file reads ${SCHEMA}; compile the model again`);
  }
  if (manifest.target?.arch !== 'wasm32') {
    throw new SparsecError(`the artifact is for ${manifest.target?.arch}, not wasm32; compile with --target wasm`);
  }
  const missing = missingFeatures(manifest.features);
  if (missing.length) {
    throw new SparsecError(`this engine lacks ${missing.join(' and ')}; use a newer one, or compile with another --cpu`);
  }
  const [code, weights] = await Promise.all(
    ['model.wasm', 'weights.bin'].map(async (name) => {
      const bytes = await read(new URL(name, folder));
      const expected = manifest.files[name].bytes;
      if (bytes.byteLength !== expected) {
        throw new SparsecError(`${name} has ${bytes.byteLength} bytes, expected ${expected}; copy the artifact again`);
      }
      return bytes;
    }),
  );
  let instance;
  try {
    ({ instance } = await WebAssembly.instantiate(code, {}));
  } catch (error) {
    throw new SparsecError(`model.wasm cannot be loaded: ${error.message}`);
  }
  return new Model(manifest, instance.exports, weights);
}

function parse(bytes, folder) {
  try {
    return JSON.parse(new TextDecoder().decode(bytes));
  } catch (error) {
    throw new SparsecError(`manifest.json in ${folder} is damaged: ${error.message}`);
  }
}

async function read(url) {
  try {
    if (url.protocol === 'file:') {
      const { readFile } = await import('node:fs/promises');
      return await readFile(url);
    }
    const response = await fetch(url);
    if (!response.ok) throw new Error(`HTTP ${response.status}`);
    return new Uint8Array(await response.arrayBuffer());
  } catch (error) {
    throw new SparsecError(`cannot read ${url}: ${error.message}`);
  }
}

/* An opened model. `name`; `inputs`, `outputs`: { name, shape, dtype, quantization } in signature order. */
export class Model {
  #wasm;
  #model = 0;
  #sources;
  #sinks;
  #pointers;

  constructor(manifest, wasm, weights) {
    this.name = manifest.name;
    this.inputs = manifest.inputs;
    this.outputs = manifest.outputs;
    this.#wasm = wasm;
    wasm._initialize?.();
    const block = this.#allocate(weights.byteLength + ALIGNMENT);
    const start = Math.ceil(block / ALIGNMENT) * ALIGNMENT;
    new Uint8Array(wasm.memory.buffer).set(weights, start);
    const slot = this.#allocate(4);
    this.#check(wasm.sparsec_open(start, weights.byteLength, 0, slot));
    this.#model = this.#view().getUint32(slot, true);
    const info = this.#allocate(INFO_BYTES);
    this.#sources = this.#ports('input', this.inputs, info);
    this.#sinks = this.#ports('output', this.outputs, info);
    wasm.free(info);
    wasm.free(slot);
    const all = [...this.#sources, ...this.#sinks];
    this.#pointers = this.#allocate(4 * Math.max(1, all.length));
    all.forEach((port, i) => this.#view().setUint32(this.#pointers + 4 * i, port.at, true));
  }

  /* Runs the model once. `feeds`: for each input a typed array of its type and size, row-major. -> the same of outputs. */
  run(feeds) {
    this.set(feeds);
    this.step();
    return Object.fromEntries(this.#sinks.map((port) => [port.name, this.#array(port).slice()]));
  }

  /* Copies inputs into the model, which keeps them. */
  set(feeds) {
    if (!this.#model) throw new SparsecError('the model is closed');
    const known = new Set(this.#sources.map((port) => port.name));
    const unknown = Object.keys(feeds).find((name) => !known.has(name));
    if (unknown !== undefined) {
      throw new SparsecError(`the model has no input '${unknown}', only ${[...known].join(', ')}`);
    }
    for (const port of this.#sources) {
      const values = feeds[port.name];
      if (!(values instanceof port.type)) {
        const found = values === undefined ? 'nothing' : (values?.constructor?.name ?? String(values));
        throw new SparsecError(`input '${port.name}' is ${port.dtype}: expected a ${port.type.name}, got ${found}`);
      }
      if (values.length !== port.length) {
        const shape = port.shape.join(' x ');
        throw new SparsecError(`input '${port.name}' is ${shape}: expected ${port.length} values, got ${values.length}`);
      }
      this.#array(port).set(values);
    }
  }

  /* Runs the model on the inputs that it has; what `run` does between copying in and out. */
  step() {
    if (!this.#model) throw new SparsecError('the model is closed');
    this.#check(this.#wasm.sparsec_run(this.#model, this.#pointers, this.#pointers + 4 * this.#sources.length));
  }

  /* Bytes of memory that the model holds. */
  get bytes() {
    return this.#wasm.memory.buffer.byteLength;
  }

  /* Lets go of the memory; the model cannot be used again. */
  close() {
    if (this.#model) this.#wasm.sparsec_close(this.#model);
    this.#model = 0;
    this.#wasm = { memory: { buffer: new ArrayBuffer(0) } };
  }

  #ports(side, tensors, info) {
    const count = this.#wasm[`sparsec_${side}_count`](this.#model);
    if (count !== tensors.length) {
      throw new SparsecError(`model.wasm has ${count} ${side}s, manifest.json ${tensors.length}; compile the model again`);
    }
    return tensors.map(({ name, shape, dtype }, i) => {
      const type = ARRAYS[dtype];
      const length = shape.reduce((a, b) => a * b, 1);
      this.#check(this.#wasm[`sparsec_${side}_info`](this.#model, i, info));
      const bytes = this.#view().getUint32(info + INFO_SIZE, true);
      if (type === undefined || bytes !== length * type.BYTES_PER_ELEMENT) {
        throw new SparsecError(`${side} '${name}' has ${bytes} bytes, manifest.json says ${dtype} ${shape.join(' x ')}`);
      }
      return { name, shape, dtype, type, length, at: this.#allocate(Math.max(bytes, 8)) };
    });
  }

  #array(port) {
    return new port.type(this.#wasm.memory.buffer, port.at, port.length);
  }

  #view() {
    return new DataView(this.#wasm.memory.buffer);
  }

  #allocate(bytes) {
    const pointer = this.#wasm.malloc(bytes) >>> 0;
    if (!pointer) throw new SparsecError(`out of memory: ${bytes} bytes more than the engine gives`);
    return pointer;
  }

  #check(code) {
    if (code === 0) return;
    const bytes = new Uint8Array(this.#wasm.memory.buffer, this.#wasm.sparsec_error_string(code) >>> 0);
    throw new SparsecError(`${new TextDecoder().decode(bytes.subarray(0, bytes.indexOf(0)))} (code ${code})`);
  }
}
