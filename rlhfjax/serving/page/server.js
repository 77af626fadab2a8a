// What the page asks of its server: models, answers as they are written, and votes to keep.

let token = sessionStorage.getItem("token") || "";

export function useToken(given) {
  token = given;
  sessionStorage.setItem("token", given);
}

async function ask(where, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  const init = body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify(body), signal };
  const answer = await fetch(where, init);
  if (answer.ok) return answer;
  let said = answer.statusText;
  try {
    said = (await answer.json()).error.message;
  } catch {
    // no JSON: the status has to do
  }
  throw Object.assign(new Error(said || `status ${answer.status}`), { status: answer.status });
}

export const settings = async () => (await ask("v1/chat/settings")).json();
export const models = async () => (await (await ask("v1/models")).json()).data;
export const keep = (record) => ask("v1/feedback", record);

// The chunks of an answer.
export async function* answer(request, signal) {
  const body = { ...request, stream: true };
  const reader = (await ask("v1/chat/completions", body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split(/\r?\n\r?\n/);
    held = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
      if (!data || data.trim() === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}
