// A frontend as a simple client would write it: it pulls at each content_delta, appends what comes, and stops at
// message_completed. The server's contract says that this works on a near network; test_seed_frontend.py holds it to that.
//
// backendService, contextStream and the actions are the code of the frontend migration plan that the contract was made
// for, with its TypeScript types removed and nothing else changed. The rest plays the parts of XState, React and the
// person: a small interpreter of the machine's THINKING and IDLE, the state of the hook, and who types.

const parameters = new URLSearchParams(location.search);
const API_BASE_URL = parameters.get("api");

// --- The plan's code: the service ---

const backendService = {
  subscribeToContextEvents(contextId, onEvent, onError) {
    const eventSource = new EventSource(
      `${API_BASE_URL}/contexts/${contextId}/stream`
    );

    eventSource.onmessage = (event) => {
      try {
        const data = JSON.parse(event.data);
        onEvent(data);
      } catch (error) {
        console.error("Failed to parse SSE event:", error);
        onError?.(error);
      }
    };

    eventSource.onerror = (error) => {
      console.error("EventSource error:", error);
      onError?.(error);
    };

    // Return cleanup function
    return () => {
      eventSource.close();
    };
  },

  async getMessageContent(contextId, messageId, fromSequence) {
    const url = fromSequence
      ? `${API_BASE_URL}/contexts/${contextId}/messages/${messageId}/content?from_sequence=${fromSequence}`
      : `${API_BASE_URL}/contexts/${contextId}/messages/${messageId}/content`;

    const response = await fetch(url);
    if (!response.ok) {
      throw new Error(`Failed to fetch message content: ${response.status}`);
    }
    return response.json();
  },

  async sendMessage(contextId, content) {
    const response = await fetch(
      `${API_BASE_URL}/contexts/${contextId}/messages`,
      {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({
          payload: {
            type: "text",
            content,
            display: null,
          },
          client_metadata: {},
        }),
      }
    );

    if (!response.ok) {
      throw new Error(`Failed to send message: ${response.status}`);
    }
  },
};

// --- The plan's code: the actor ---

const contextStream = ({ input, sendBack }) => {
  const { contextId } = input;
  let currentSequence = 0;
  let currentMessageId = null;

  // Subscribe to SSE events
  const unsubscribe = backendService.subscribeToContextEvents(
    contextId,
    async (event) => {
      switch (event.type) {
        case "content_delta":
          // Pull content from REST API
          try {
            const content = await backendService.getMessageContent(
              event.context_id,
              event.message_id,
              currentSequence
            );

            currentSequence = content.sequence;
            currentMessageId = event.message_id;

            sendBack({
              type: "CHUNK_RECEIVED",
              payload: { chunk: content.content },
            });
          } catch (error) {
            sendBack({
              type: "STREAM_ERROR",
              payload: { error: error },
            });
          }
          break;

        case "message_completed":
          sendBack({
            type: "STREAM_COMPLETE_TEXT",
            payload: { finalContent: "" }, // Content already accumulated
          });
          break;

        case "state_changed":
          console.log(`[ContextStream] State changed: ${event.new_state}`);
          break;

        case "heartbeat":
          // Keep connection alive
          break;
      }
    },
    (error) => {
      sendBack({
        type: "STREAM_ERROR",
        payload: { error },
      });
    }
  );

  return () => {
    unsubscribe();
  };
};

// --- XState, as far as the plan's machine needs it ---

function createActor(machine, contextId) {
  let stop = () => {};
  const actor = {
    state: "IDLE",
    send(event) {
      const transition = machine[actor.state].on[event.type];
      if (transition === undefined) return;
      transition.action?.(event);
      if (transition.target === undefined) return;
      stop(); // Leaving a state stops what it invoked.
      actor.state = transition.target;
      stop = machine[actor.state].invoke?.(contextId, actor) ?? (() => {});
      actor.onTransition?.();
    },
  };
  return actor;
}

function invokeCallback(callback) {
  return (contextId, actor) => {
    let stopped = false;
    const cleanUp = callback({
      input: { contextId },
      sendBack: (event) => stopped || actor.send(event), // What a stopped actor sends is not delivered.
    });
    return () => {
      stopped = true;
      cleanUp();
    };
  };
}

// --- What a reader of the test should know: did signals overtake the pulls of those before them? ---

let inFlight = 0;
let overtaken = 0;
const plansPull = backendService.getMessageContent;
backendService.getMessageContent = async (...pulled) => {
  overtaken += inFlight > 0;
  inFlight += 1;
  try {
    return await plansPull(...pulled);
  } finally {
    inFlight -= 1;
  }
};

// --- And did the page stand still, so that what should have come one after the other came at once? ---

let longestPause = 0;
let lastTick = performance.now();
setInterval(() => {
  const now = performance.now();
  longestPause = Math.max(longestPause, now - lastTick);
  lastTick = now;
}, 10);

// --- React's state, and who reads it ---

const ui = { streamingText: "", streamed: [], error: null };
const setStreamingText = (update) => {
  ui.streamingText = update(ui.streamingText);
};

const describe = (error) => (error instanceof Error ? String(error) : `EventSource ${error.type}`);

const chatMachine = {
  IDLE: { on: { USER_SUBMITS: { target: "THINKING", action: () => (ui.error = null) } } },
  THINKING: {
    invoke: invokeCallback(contextStream),
    on: {
      CHUNK_RECEIVED: {
        action: (event) => {
          ui.streamed.push(event.payload.chunk);
          setStreamingText((prev) => prev + event.payload.chunk);
        },
      },
      STREAM_COMPLETE_TEXT: { target: "IDLE", action: () => (overtaken += inFlight > 0) },
      STREAM_ERROR: { target: "IDLE", action: (event) => (ui.error = describe(event.payload.error)) },
      CANCEL: { target: "IDLE" },
    },
  },
};

async function converse(contextId, texts) {
  const actor = createActor(chatMachine, contextId);
  const replies = [];
  for (const text of texts) {
    const idle = new Promise((resolve) => {
      actor.onTransition = () => actor.state === "IDLE" && resolve();
    });
    Object.assign(ui, { streamingText: "", streamed: [], error: null });
    overtaken = longestPause = 0;
    await backendService.sendMessage(contextId, text);
    actor.send({ type: "USER_SUBMITS", payload: { messages: [] } });
    await idle;
    replies.push({
      text: ui.streamingText, parts: ui.streamed.length, error: ui.error, overtaken, longest_pause_ms: longestPause,
    });
    if (ui.error !== null) break; // The reply may be going on, so that the next message would be refused.
  }
  return replies;
}

// --- A bare EventSource with named events, over a restart of the server ---

function listen(contextId) {
  const source = new EventSource(`${API_BASE_URL}/contexts/${contextId}/stream?named=true`);
  source.onmessage = (event) => report("event", { type: "unnamed", data: event.data });
  source.onerror = () => report("event", { type: "error", readyState: source.readyState });
  source.onopen = () => report("event", { type: "open" });
  for (const type of ["state_changed", "content_delta", "message_completed"]) {
    source.addEventListener(type, (event) =>
      report("event", { type, id: event.lastEventId, data: JSON.parse(event.data) })
    );
  }
}

// --- What the test is told, in order ---

let reported = Promise.resolve();
function report(kind, value) {
  reported = reported.then(() => fetch("/report", { method: "POST", body: JSON.stringify({ kind, value }) }));
}

const contextId = parameters.get("context");
try {
  if (parameters.get("part") === "converse") {
    report("replies", await converse(contextId, parameters.getAll("text")));
  } else {
    listen(contextId);
  }
} catch (error) {
  report("failure", String(error));
}
