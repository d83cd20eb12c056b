/* What the runtime `chromium` opens: fetches requests from /next, one after another, and posts the answers. */
import { answer, message } from './requests.js';

const post = (body) => fetch('/answer', { method: 'POST', body });

async function serve() {
  const folder = new URL('/models/0/', location.href);
  const { ARRAYS, load } = await import(`${folder}model.js`);
  const model = await load(folder);
  await post(message({ ready: true }));
  for (;;) {
    const raw = await (await fetch('/next')).arrayBuffer();
    const size = new DataView(raw).getUint32(0, true);
    const request = JSON.parse(new TextDecoder().decode(new Uint8Array(raw, 4, size)));
    if (request.op === 'close') return;
    await post(answer(model, ARRAYS, request, new Uint8Array(raw, 4 + size)));
  }
}

serve().catch((error) => post(message({ error: error.message })));
