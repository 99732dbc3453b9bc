"use strict";
// Sends the prompt to both servers, shows their tokens as they come, and marks where they differ.

const $ = id => document.getElementById(id);
const sides = ["a", "b"].map(id => ({
  id, words: $(id).querySelector(".words"), speed: $(id).querySelector(".speed"), tokens: [],
}));
let stop = null;

fetch("files").then(r => r.json()).then(files => {
  files.forEach((file, i) => {
    const size = file.bytes >= 1e9 ? `${(file.bytes / 1e9).toFixed(2)} GB` : `${(file.bytes / 1e6).toFixed(2)} MB`;
    $(sides[i].id).querySelector("h2").textContent = `${file.name}, ${size}`;
  });
  $("chat").checked = files.every(file => file.chat);
  document.title = files.map(file => file.name).join(" | ");
});

async function post(side, path, body) {
  const answer = await fetch(side.id + path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal: stop.signal,
  });
  if (!answer.ok) throw new Error(`${side.id}: ${answer.status} ${(await answer.text()).slice(0, 300)}`);
  return answer;
}

// one server's answer: lines "data: {...}", each with some tokens
async function run(side, prompt) {
  if ($("chat").checked) {
    const templated = await post(side, "/apply-template", { messages: [{ role: "user", content: prompt }] });
    prompt = (await templated.json()).prompt;
  }
  const answer = await post(side, "/completion", {
    prompt, stream: true, return_tokens: true, n_predict: $("tokens").valueAsNumber || 200,
    temperature: $("temperature").valueAsNumber || 0, seed: 1, cache_prompt: false,
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  const started = performance.now();
  for (let rest = "", done = false; !done;) {
    const piece = await reader.read();
    done = piece.done;
    rest += piece.value ?? "";
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) take(side, JSON.parse(line.slice(6)), started);
    show();
  }
}

function take(side, found, started) {
  if (found.error) throw new Error(`${side.id}: ${found.error.message}`);
  // a letter of several tokens comes with the last of them
  if (found.content || found.tokens?.length) side.tokens.push({ id: String(found.tokens), text: found.content ?? "" });
  const seconds = (performance.now() - started) / 1000;
  side.speed.textContent = `${side.tokens.length} tokens, ${(side.tokens.length / seconds).toFixed(1)} tokens/s`;
  if (found.stop && found.timings) {
    const t = found.timings;
    side.speed.textContent = `${t.predicted_n} tokens, ${t.predicted_per_second.toFixed(1)} tokens/s; ` +
      `prompt ${t.prompt_n} tokens, ${t.prompt_per_second.toFixed(1)} tokens/s`;
  }
}

// kinds of both sides' tokens: "" where both have it, "part" at the first difference, "own" where one has it alone
function kinds(a, b) {
  let same = 0;
  while (same < a.length && same < b.length && a[same].id === b[same].id) same++;
  const x = a.slice(same), y = b.slice(same), width = y.length + 1;
  if (!x.length || !y.length || x.length * y.length > 4e6) return [a, b].map(t => t.map((_, i) => i < same || !x.length || !y.length ? "" : i === same ? "part" : "own"));
  const longest = new Uint16Array((x.length + 1) * width);
  for (let i = x.length - 1; i >= 0; i--)
    for (let j = y.length - 1; j >= 0; j--)
      longest[i * width + j] = x[i].id === y[j].id ? longest[(i + 1) * width + j + 1] + 1 : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
  const found = [a, b].map(t => t.map((_, i) => i < same ? "" : "own"));
  for (let i = 0, j = 0; i < x.length && j < y.length;) {
    if (x[i].id === y[j].id) { found[0][same + i++] = ""; found[1][same + j++] = ""; }
    else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i++;
    else j++;
  }
  found[0][same] = found[1][same] = "part";
  return found;
}

let planned = false;
function show() {
  if (planned) return;
  planned = true;
  requestAnimationFrame(() => {
    planned = false;
    const found = kinds(sides[0].tokens, sides[1].tokens);
    sides.forEach((side, k) => side.words.replaceChildren(...side.tokens.map((token, i) => {
      if (!found[k][i]) return document.createTextNode(token.text);
      const mark = document.createElement("mark");
      mark.className = found[k][i];
      mark.textContent = token.text;
      return mark;
    })));
  });
}

$("form").addEventListener("submit", async event => {
  event.preventDefault();
  stop = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  $("said").textContent = "";
  for (const side of sides) { side.tokens = []; side.words.textContent = ""; side.speed.textContent = "waiting"; }
  try {
    const prompt = $("prompt").value;
    if ($("turns").checked) for (const side of sides) await run(side, prompt);
    else await Promise.all(sides.map(side => run(side, prompt)));
  } catch (error) {
    $("said").textContent = error.name === "AbortError" ? "stopped" : `${error.message}. Look at the terminal in which mobe-gguf runs.`;
    stop.abort();
  }
  show();
  $("send").disabled = false;
  $("stop").disabled = true;
});
$("stop").addEventListener("click", () => stop.abort());
$("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
