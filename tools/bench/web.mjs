/* WebAssembly artifacts beside each other and beside onnxruntime-web, in turns, in one Node process, one thread.
 *
 *     npm install onnxruntime-web                    # in any folder; run this from there
 *     node .../tools/bench/web.mjs MODEL.onnx A.sparsec B.sparsec ...
 *     node .../tools/bench/web.mjs - A.sparsec ...   # without onnxruntime-web
 *
 * Prints medians of ROUNDS runs after WARMUP, and how many times as fast as the first each one is.
 */
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { basename, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';

const ROUNDS = 31;
const WARMUP = 5;
const [onnx, ...folders] = process.argv.slice(2);
if (!folders.length) {
  console.error('usage: node web.mjs MODEL.onnx|- ARTIFACT...');
  process.exit(2);
}

const filled = (length) => Float32Array.from({ length }, (_, i) => Math.sin(i));
const engines = [];
if (onnx !== '-') {
  const found = createRequire(resolve('here.js')).resolve('onnxruntime-web');
  const ort = await import(pathToFileURL(found));
  const { env, InferenceSession, Tensor } = ort.default ?? ort;
  env.wasm.numThreads = 1;
  const session = await InferenceSession.create(readFileSync(onnx), { executionProviders: ['wasm'] });
  const feeds = Object.fromEntries(
    session.inputMetadata.map(({ name, shape }) => {
      const dims = shape.map((d) => (typeof d === 'number' ? d : 1));
      return [name, new Tensor('float32', filled(dims.reduce((a, b) => a * b, 1)), dims)];
    }),
  );
  engines.push({ name: `onnxruntime-web ${env.versions?.web ?? ''}`, step: () => session.run(feeds) });
}
for (const folder of folders) {
  const url = pathToFileURL(`${resolve(folder)}/`);
  const began = performance.now();
  const { load } = await import(new URL('model.js', url));
  const model = await load(url);
  const feeds = Object.fromEntries(model.inputs.map(({ name, shape }) => [name, filled(shape.reduce((a, b) => a * b, 1))]));
  model.run(feeds);
  const opened = `, ${(performance.now() - began).toFixed(0)} ms to load and run once`;
  engines.push({ name: basename(folder) + opened, step: () => model.step() });
}

const times = engines.map(() => []);
for (let round = -WARMUP; round < ROUNDS; round++) {
  for (const [i, { step }] of engines.entries()) {
    const start = performance.now();
    await step();
    if (round >= 0) times[i].push(performance.now() - start);
  }
}
const medians = times.map((t) => t.sort((a, b) => a - b)[ROUNDS >> 1]);
engines.forEach(({ name }, i) => {
  console.log(`${medians[i].toFixed(2).padStart(9)} ms  ${(medians[0] / medians[i]).toFixed(2).padStart(6)}x  ${name}`);
});
