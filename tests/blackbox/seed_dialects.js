// Three frontends that were written for other servers, each reading a reply of this one to its end in its own dialect.
//
// The code of each is that of the plan or guide that the dialect was taken from, without its TypeScript types. What had
// to be changed is said beside it: where the request goes, and in one place an error by which it could never have read
// an event. The rest plays the parts of the page around it.

const parameters = new URLSearchParams(location.search);
const API = parameters.get("api");
const contextId = parameters.get("context");
const text = parameters.get("text");

async function post(content) {
  const response = await fetch(`${API}/contexts/${contextId}/messages`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ payload: { type: "text", content } }),
  });
  if (!response.ok) throw new Error(`post: ${response.status}`);
  return `${API}/contexts/${contextId}/messages/${(await response.json()).reply_message_id}/events`;
}

// --- nexus: POST /chat, and the loop that parses its stream. Nothing is changed. ---

class EventEmitter {
  listeners = new Map();
  on(event, callback) {
    this.listeners.set(event, [...(this.listeners.get(event) ?? []), callback]);
  }
  emit(event, payload) {
    for (const callback of this.listeners.get(event) ?? []) callback(payload);
  }
}

class StreamManager {
  emitter = new EventEmitter();
  publicKey = "";
  baseUrl;
  abortController = null;

  constructor(baseUrl, publicKey) {
    this.baseUrl = baseUrl;
    this.publicKey = publicKey;
  }

  async sendMessage(content) {
    if (this.abortController) {
      this.abortController.abort();
    }
    this.abortController = new AbortController();

    const response = await fetch(`${this.baseUrl}/chat`, {
      method: 'POST',
      headers: {
        'Authorization': `Bearer ${this.publicKey}`,
        'Content-Type': 'application/json'
      },
      body: JSON.stringify({
        content,
        client_timestamp_utc: new Date().toISOString(),
        client_timezone_offset: new Date().getTimezoneOffset()
      }),
      signal: this.abortController.signal
    });

    if (!response.ok) {
      throw new Error(`Chat request failed: ${response.status}`);
    }

    // Parse SSE stream
    const reader = response.body.getReader();
    const decoder = new TextDecoder();
    let buffer = '';

    while (true) {
      const { done, value } = await reader.read();
      if (done) break;

      buffer += decoder.decode(value, { stream: true });
      const lines = buffer.split('\n');
      buffer = lines.pop() || '';

      let currentEvent = '';
      let currentData = '';

      for (const line of lines) {
        if (line.startsWith('event: ')) {
          currentEvent = line.slice(7);
        } else if (line.startsWith('data: ')) {
          currentData = line.slice(6);
        } else if (line === '' && currentEvent && currentData) {
          // Complete event
          const payload = JSON.parse(currentData);
          this.emitter.emit(currentEvent, payload.payload || payload);
          currentEvent = '';
          currentData = '';
        }
      }
    }
  }

  on(event, callback) {
    this.emitter.on(event, callback);
  }
}

async function nexus() {
  const streamManager = new StreamManager(API, "a-public-key");
  const events = [];
  const names = ["run_started", "text_chunk", "tool_call_started", "tool_call_finished", "run_finished", "error"];
  for (const name of names) streamManager.on(name, (payload) => events.push([name, payload]));
  await streamManager.sendMessage(text);
  return { events, text: joined(events, "text_chunk", "chunk") };
}

// --- assistant, read with fetch. Changed: the URL and the body are this server's, and `event` is declared outside of
// the `if`, without which the function that handles events would never be told which one it got. ---

const seen = [];
const console = {
  log: (label, data) => seen.push([label, data]),
  error: (label, data) => seen.push([label, data]),
};

async function sendMessage(chatId, model, content) {
  const response = await fetch(`${API}/contexts/${chatId}/messages?dialect=assistant`, {
    method: 'POST',
    headers: {
      'Content-Type': 'application/json',
      Authorization: 'Bearer your-token', // Optional
    },
    body: JSON.stringify({ payload: { type: 'text', content } }),
  });

  const reader = response.body.getReader();
  const decoder = new TextDecoder();

  let event;
  while (true) {
    const { done, value } = await reader.read();
    if (done) break;

    const chunk = decoder.decode(value);
    const lines = chunk.split('\n');

    for (const line of lines) {
      if (line.startsWith('event: ')) {
        event = line.slice(7);
      } else if (line.startsWith('data: ')) {
        const data = JSON.parse(line.slice(6));
        handleSSEEvent(event, data);
      }
    }
  }
}

function handleSSEEvent(event, data) {
  switch (event) {
    case 'assistant_typing':
      console.log('Assistant is typing...');
      break;
    case 'assistant_delta':
      console.log('Delta:', data.delta);
      // Append delta to UI
      break;
    case 'assistant_complete':
      console.log('Message completed:', data);
      break;
    case 'assistant_error':
      console.error('Error:', data.error);
      break;
    case 'usage_info':
      console.log('Usage updated:', data);
      break;
  }
}

async function assistantByFetch() {
  await sendMessage(contextId, "any", text);
  const deltas = seen.filter(([label]) => label === "Delta:").map(([, delta]) => delta);
  return { events: seen, text: deltas.join("") };
}

// --- assistant, with an EventSource. Changed: both URLs and the body; the headers, which an EventSource ignores. ---

function sendMessageWithEventSource({ appendDeltaToUI, finalizeMessage, showError }) {
  post(text).then((events) => {
    // Create EventSource for streaming response
    const eventSource = new EventSource(`${events}?dialect=assistant`);

    eventSource.addEventListener('assistant_delta', (event) => {
      const data = JSON.parse(event.data);
      appendDeltaToUI(data.delta);
    });

    eventSource.addEventListener('assistant_complete', (event) => {
      const data = JSON.parse(event.data);
      finalizeMessage(data);
      eventSource.close();
    });

    eventSource.addEventListener('assistant_error', (event) => {
      const data = JSON.parse(event.data);
      showError(data.error);
      eventSource.close();
    });
  });
}

function assistant() {
  return new Promise((resolve) => {
    let shown = "";
    sendMessageWithEventSource({
      appendDeltaToUI: (delta) => (shown += delta),
      finalizeMessage: (data) => resolve({ text: shown, finalized: data }),
      showError: (error) => resolve({ text: shown, error }),
    });
  });
}

// --- agent, with an EventSource. Changed: the message is posted first, and the URL is that of its reply; emoji and
// words of the page are in English, and where it logs or lets go of its EventSource, this page is told. ---

let currentEventSource = null;

async function agent() {
  const output = document.getElementById('output');
  const events = await post(text);
  let done;
  const finished = new Promise((resolve) => (done = resolve));

  if (currentEventSource) {
    currentEventSource.close();
  }
  currentEventSource = new EventSource(`${events}?dialect=agent`);

  currentEventSource.addEventListener('AGENT_START', (e) => {
    output.innerHTML += 'Agent start';
  });

  currentEventSource.addEventListener('STEP_START', (e) => {
    const data = JSON.parse(e.data);
    output.innerHTML += `\n[step ${data.step}/${data.max_steps}]\n`;
  });

  currentEventSource.addEventListener('THINKING', (e) => {
    const data = JSON.parse(e.data);
    output.innerHTML += `<span class="thinking">thinks ${data.content}</span>\n`;
  });

  currentEventSource.addEventListener('TOOL_CALL_START', (e) => {
    const data = JSON.parse(e.data);
    output.innerHTML += `<span class="tool-call">calls ${data.tool_name}</span> `;
  });

  currentEventSource.addEventListener('TOOL_CALL_FINISH', (e) => {
    const data = JSON.parse(e.data);
    output.innerHTML += `<span class="tool-call">done</span>\n`;
  });

  currentEventSource.addEventListener('LLM_CHUNK', (e) => {
    const data = JSON.parse(e.data);
    output.innerHTML += data.content;
    output.scrollTop = output.scrollHeight;
  });

  currentEventSource.addEventListener('AGENT_FINISH', (e) => {
    done({ text: output.textContent, result: JSON.parse(e.data).result });
    currentEventSource.close();
    currentEventSource = null;
  });

  // A break in the connection is an `error` of the EventSource; this one, in capitals, is of the server.
  currentEventSource.addEventListener('ERROR', (e) => {
    const data = JSON.parse(e.data);
    output.innerHTML += `<span class="error">error: ${data.error}</span>\n`;
    done({ text: output.textContent, error: data.error });
    currentEventSource.close();
    currentEventSource = null;
  });

  return finished;
}

// --- What the test is told ---

const joined = (events, name, field) =>
  events.filter(([event]) => event === name).map(([, payload]) => payload[field]).join("");

async function report(kind, value) {
  await fetch("/report", { method: "POST", body: JSON.stringify({ kind, value }) });
}

try {
  await report("read", await { nexus, assistantByFetch, assistant, agent }[parameters.get("part")]());
} catch (error) {
  await report("failure", String(error));
}
