/* The page of `sparsec serve`: one input, every model beside the others, the top answers and the median latency of each.
 *
 * models.json: { models: [{ url, name, zeros, bytes, parity }], labels: [...], preprocess: { scale, mean, std, color, layout } }
 */
import { missingFeatures } from './model.js';

const RUNS = 21; // timed runs of each model, in turns
const SHORTEST = 4; // milliseconds; shorter runs are timed several together
const TOP = 5;
const element = (id) => document.getElementById(id);
const canvas = element('picture');
const pen = canvas.getContext('2d', { willReadFrequently: true });
const median = (values) => values.toSorted((a, b) => a - b)[values.length >> 1];

let page; // models.json
let models = []; // { facts, model, card, sample }
let side; // { height, width, channels } of the picture that the models take, or null

async function start() {
  const lacking = missingFeatures(['simd128', 'relaxed-simd']);
  element('engine').textContent = lacking.length ? `This browser lacks ${lacking.join(' and ')}.` : '';
  page = await (await fetch('models.json')).json();
  for (const facts of page.models) {
    const { load } = await import(`${facts.url}model.js`);
    const began = performance.now();
    const model = await load(new URL(facts.url, location.href));
    const opened = performance.now() - began;
    models.push({ facts, model, opened, card: card(facts, model, opened), sample: null });
  }
  side = picture(models[0].model.inputs);
  element('hint').textContent = side ? `${side.width} x ${side.height}: draw, or take a picture` : 'These models take no pictures.';
  blank();
  await sample();
}

/* Height, width and channels if the one input is a picture. */
function picture(inputs) {
  if (inputs.length !== 1 || inputs[0].dtype !== 'float32') return null;
  const shape = inputs[0].shape.slice(-3);
  const [channels, height, width] = page.preprocess.layout === 'nhwc' ? [shape[2], shape[0], shape[1]] : shape;
  return shape.length === 3 && [1, 3].includes(channels) && Math.min(height, width) >= 8 ? { channels, height, width } : null;
}

function card(facts, model, opened) {
  const article = document.createElement('article');
  article.innerHTML = '<h2></h2><p class="facts"></p><p class="latency"></p><p class="facts"></p><ol></ol>';
  const [name, about] = article.children;
  name.textContent = facts.name;
  about.textContent = `${(100 * facts.zeros).toFixed(0)} % zeros, ${(facts.bytes / 1e6).toFixed(2)} MB, opened in ${opened.toFixed(0)} ms`;
  element('models').append(article);
  return article;
}

/* The picture as the models take it: (pixel / scale - mean) / std. */
function tensor() {
  const { channels, height, width } = side;
  const { scale, mean, std, color, layout } = page.preprocess;
  const small = new OffscreenCanvas(width, height).getContext('2d', { willReadFrequently: true });
  small.imageSmoothingQuality = 'high';
  small.drawImage(canvas, 0, 0, width, height);
  const { data } = small.getImageData(0, 0, width, height);
  const values = new Float32Array(channels * height * width);
  for (let i = 0; i < height * width; i++) {
    const [r, g, b] = data.subarray(4 * i, 4 * i + 3);
    const pixel = channels === 1 ? [0.299 * r + 0.587 * g + 0.114 * b] : color === 'bgr' ? [b, g, r] : [r, g, b];
    pixel.forEach((value, c) => {
      const at = layout === 'nhwc' ? i * channels + c : c * height * width + i;
      values[at] = (value / scale - mean[c % mean.length]) / std[c % std.length];
    });
  }
  return values;
}

/* The other way: an input as the picture on the page. */
function paint(values) {
  const { channels, height, width } = side;
  const { scale, mean, std, color, layout } = page.preprocess;
  const small = new OffscreenCanvas(width, height);
  const image = new ImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) {
      const from = channels === 1 ? 0 : color === 'bgr' ? 2 - c : c;
      const value = values[layout === 'nhwc' ? i * channels + from : from * height * width + i];
      image.data[4 * i + c] = (value * std[from % std.length] + mean[from % mean.length]) * scale;
    }
    image.data[4 * i + 3] = 255;
  }
  small.getContext('2d').putImageData(image, 0, 0);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, 0, 0, canvas.width, canvas.height);
  pen.imageSmoothingEnabled = true;
}

/* Every model on the same inputs; latencies in turns, so that none has the machine to itself. */
function answer(feedsOf, expectedOf) {
  element('problem').textContent = '';
  try {
    const times = models.map(() => []);
    const outputs = models.map((entry) => entry.model.run(feedsOf(entry)));
    const together = models.map(({ model }) => Math.max(1, Math.ceil(SHORTEST / clock(model, 8))));
    for (let run = 0; run < RUNS; run++) {
      models.forEach(({ model }, i) => times[i].push(clock(model, together[i])));
    }
    const medians = times.map(median);
    models.forEach((entry, i) => show(entry, outputs[i], medians[i], medians[0], expectedOf?.(entry)));
    document.body.dataset.state = 'done';
    return { medians, outputs };
  } catch (error) {
    element('problem').textContent = error.message;
    document.body.dataset.state = 'failed';
    throw error;
  }
}

/* Milliseconds of one run, over `count` of them. */
function clock(model, count) {
  const began = performance.now();
  for (let i = 0; i < count; i++) model.step();
  return Math.max(performance.now() - began, 0.01) / count;
}

function show({ model, card }, outputs, ms, first, expected) {
  const [, , latency, parity, list] = card.children;
  latency.innerHTML = '<span></span> <small></small>';
  latency.children[0].textContent = `${ms < 10 ? ms.toFixed(2) : ms.toFixed(1)} ms`;
  latency.children[1].textContent = ms === first ? 'median' : `median, ${(first / ms).toFixed(2)}x as fast as the first`;
  parity.textContent = expected ? `largest relative error to ONNX Runtime ${error(model, outputs, expected).toExponential(1)}` : '';
  const scores = outputs[model.outputs[0].name];
  list.replaceChildren(...top(Array.from(scores, Number)).map(([index, share]) => {
    const item = document.createElement('li');
    item.innerHTML = '<span></span><span></span>';
    item.children[0].textContent = page.labels[index] ?? `class ${index}`;
    item.children[1].textContent = `${(100 * share).toFixed(1)} %`;
    item.style.setProperty('--share', `${100 * share}%`);
    return item;
  }));
}

/* The TOP best of scores as [index, probability]; scores that are no probabilities go through softmax. */
function top(scores) {
  const sum = scores.reduce((a, b) => a + b, 0);
  const most = Math.max(...scores);
  const shares = scores.every((s) => s >= 0) && Math.abs(sum - 1) < 1e-2 ? scores : scores.map((s) => Math.exp(s - most));
  const total = shares.reduce((a, b) => a + b, 0);
  return shares.map((s, i) => [i, s / total]).sort((a, b) => b[1] - a[1]).slice(0, TOP);
}

/* max |difference| / max |reference| of the worst output. */
function error(model, outputs, expected) {
  return Math.max(...model.outputs.map(({ name }) => {
    const size = expected[name].reduce((most, value) => Math.max(most, Math.abs(Number(value))), 0);
    const apart = expected[name].reduce((most, value, i) => Math.max(most, Math.abs(Number(value) - Number(outputs[name][i]))), 0);
    return apart / (size || 1);
  }));
}

/* parity.bin: 64 bytes of header with the number of outputs at 12, a float32 for each, inputs, expected outputs. */
async function proof(entry) {
  if (entry.sample) return;
  const { ARRAYS } = await import(`${entry.facts.url}model.js`);
  const raw = await (await fetch(`${entry.facts.url}parity.bin`)).arrayBuffer();
  let offset = 64 + 4 * new DataView(raw).getUint32(12, true);
  const read = (tensors) => Object.fromEntries(tensors.map(({ name, shape, dtype }) => {
    const size = shape.reduce((a, b) => a * b, 1) * ARRAYS[dtype].BYTES_PER_ELEMENT;
    const array = new ARRAYS[dtype](raw.slice(offset, offset + size));
    offset += size;
    return [name, array];
  }));
  entry.sample = { inputs: read(entry.model.inputs), outputs: read(entry.model.outputs) };
}

async function sample() {
  await Promise.all(models.map(proof));
  if (side) paint(Object.values(models[0].sample.inputs)[0]);
  const result = answer(({ sample }) => sample.inputs, ({ sample }) => sample.outputs);
  const errors = models.map(({ model, sample }, i) => error(model, result.outputs[i], sample.outputs));
  window.sparsec = { names: models.map(({ facts }) => facts.name), errors, medians: result.medians, opened: models.map((m) => m.opened) };
  dispatchEvent(new Event('sparsec'));
}

function blank() {
  pen.fillStyle = '#808080';
  pen.fillRect(0, 0, canvas.width, canvas.height);
}

function look() {
  if (!side) return;
  const values = tensor();
  answer(({ model }) => ({ [model.inputs[0].name]: values }));
}

let last = null;
canvas.addEventListener('pointerdown', (event) => {
  canvas.setPointerCapture(event.pointerId);
  last = [event.offsetX, event.offsetY];
});
canvas.addEventListener('pointermove', (event) => {
  if (!last) return;
  pen.strokeStyle = '#f8f8f8';
  pen.lineWidth = 22;
  pen.lineCap = 'round';
  pen.beginPath();
  pen.moveTo(...last);
  pen.lineTo((last = [event.offsetX, event.offsetY])[0], last[1]);
  pen.stroke();
});
canvas.addEventListener('pointerup', () => {
  last = null;
  look();
});
element('clear').addEventListener('click', blank);
element('sample').addEventListener('click', sample);
element('file').addEventListener('change', async (event) => {
  if (!event.target.files.length) return;
  const bitmap = await createImageBitmap(event.target.files[0]);
  const edge = Math.min(bitmap.width, bitmap.height); // the centre
  pen.drawImage(bitmap, (bitmap.width - edge) / 2, (bitmap.height - edge) / 2, edge, edge, 0, 0, canvas.width, canvas.height);
  look();
});

start().catch((error) => {
  element('problem').textContent = error.message;
  document.body.dataset.state = 'failed';
});
