// What Streamlit leaves to the browser: hand over many files in portions, take a pasted picture or dropped folder
// wherever it lands, show progress until the server does, tell screen readers the answer, let each key press wait for
// the one before, and notice a lost connection. Mounted by app.py; all else is Python.

const PORTION_FILES = 100;
const PORTION_BYTES = 40e6; // so that the server never holds much more than its own limit
const POLL = 200; // ms
const KEY_POLL = 50; // ms; also the time for the page to draw what the script sent last
const UPLOAD_PATIENCE = 5000; // ms until files that started no run of the script are given up
const SHORTCUTS = { ArrowLeft: "←", ArrowRight: "→", m: "M", n: "N", u: "U", d: "D" }; // as their buttons show them
const KEY_PATIENCE = 10_000; // ms until a key press that started no run of the script is given up

const queue = []; // [file, uploader's class] that the server has not been given yet
let total = 0; // files in the queue since it was last empty
let uploadedAt = 0; // when a file was last being uploaded
let timer = null;
const keys = []; // pressed shortcuts that wait
let pressedAt = 0; // when a button was last pressed by its shortcut
let finishedAt = 0; // when the script last ended
let limit = Infinity; // bytes of one file
let held = 0; // pictures that the server held when it was last heard of
let lost = false;
let installed = false;
let report = () => {};
const seen = new WeakSet(); // chips of failed uploads that were reported

const all = selector => [...document.querySelectorAll(selector)];
const app = () => document.querySelector("[data-testid=stApp]");
const running = () => app().dataset.testScriptState !== "notRunning";
const uploaderOf = element =>
  /st-key-(pictures|folder)-\d+/.exec(element?.closest("[class*=st-key-pictures-], [class*=st-key-folder-]")?.className)?.[0];
const picturesUploader = () => uploaderOf(document.querySelector("[class*=st-key-pictures-] input[type=file]"));

// Whether the script has run since a time, or not even begun after so many milliseconds.
const ranSince = (time, patience) => !running() && (finishedAt > time || Date.now() - time > patience);

function showProgress() {
  const bar = document.querySelector(".st-key-client progress");
  if (!bar) return;
  bar.hidden = timer === null;
  if (total > PORTION_FILES) bar.value = 1 - queue.length / total;
  else bar.removeAttribute("value");
}

// Queue files of [file, path]; a file without a folder has its name as its path.
function add(files, uploader) {
  const good = [];
  const tooLarge = [];
  for (const [file, path] of files) {
    if (path.includes("/") && /(^|\/)\./.test(path)) continue; // a folder's hidden files
    if (file.size > limit) tooLarge.push([path, file.size, ""]);
    else good.push([path, path === file.name ? file : new File([file], path, { type: file.type })]);
  }
  if (tooLarge.length) report("refused", tooLarge);
  if (!good.length) return;
  if (good.some(([path]) => path.includes("/"))) good.sort(([one], [other]) => one.localeCompare(other));
  queue.push(...good.map(([, file]) => [file, uploader]));
  total += good.length;
  timer ??= setInterval(feed, POLL);
  feed();
}

// Give Streamlit's uploader the next files, once it and the script are done with the last ones.
function feed() {
  const failed = all("[data-testid=stFileChip][aria-invalid]").filter(chip => !seen.has(chip));
  failed.forEach(chip => seen.add(chip));
  if (failed.length) {
    const reason = "This file did not arrive; add it again.";
    report("refused", failed.map(chip => [chip.querySelector("[title]")?.title ?? "", 0, reason]));
  }
  if (all("[data-testid=stFileChipIconSpinner]").length) uploadedAt = Date.now();
  else if (ranSince(uploadedAt, UPLOAD_PATIENCE)) {
    const uploader = queue[0]?.[1];
    const input = queue.length && document.querySelector(`.${uploader} input[type=file]`);
    if (input) {
      const portion = new DataTransfer();
      let bytes = 0;
      while (queue.length && queue[0][1] === uploader && portion.files.length < PORTION_FILES) {
        bytes += queue[0][0].size;
        if (portion.files.length && bytes > PORTION_BYTES) break;
        portion.items.add(queue.shift()[0]);
      }
      uploadedAt = Date.now();
      input.files = portion.files;
      const event = new Event("change", { bubbles: true });
      event.fromQueue = true;
      input.dispatchEvent(event);
    } else {
      clearInterval(timer);
      timer = null;
      total = uploadedAt = 0;
      queue.length = 0;
    }
  }
  showProgress();
}

// The files of a dropped file or folder, as [file, path].
async function filesOf(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [[file, entry.fullPath.slice(1)]];
  }
  const reader = entry.createReader();
  const entries = [];
  for (let some; !some || some.length; entries.push(...some)) { // browsers list up to 100 at a time
    some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
  }
  return (await Promise.all(entries.map(filesOf))).flat();
}

// Streamlit sends no more than one press of a button to each run of the script, and drops presses of buttons that are
// being drawn anew. So each shortcut waits until the script has answered the one before.
function holdShortcut(event) {
  const typing = event.target.closest?.("input:not([type=radio], [type=checkbox]), textarea, [role=slider]");
  const label = SHORTCUTS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !label) return;
  if (!document.querySelector("[role=dialog], .st-key-answer")) return;
  event.stopImmediatePropagation();
  event.preventDefault();
  if (event.repeat) return;
  keys.push(label);
  if (keys.length === 1) pressHeldKeys();
}

function pressHeldKeys() {
  if (ranSince(pressedAt, KEY_PATIENCE)) {
    const place = document.querySelector("[role=dialog]") ?? document;
    const button = [...place.querySelectorAll("button:has(kbd)")].find(one => one.textContent.endsWith(keys[0]));
    if (button && !button.disabled) {
      pressedAt = Date.now();
      button.click();
    }
    keys.shift();
  }
  if (keys.length) setTimeout(pressHeldKeys, KEY_POLL);
}

function take(event, files, uploader) {
  event.preventDefault();
  event.stopImmediatePropagation();
  add(files, uploader);
}

function install() {
  document.addEventListener("change", event => {
    const uploader = event.target.type === "file" && uploaderOf(event.target);
    if (!uploader || event.fromQueue || !event.target.files.length) return;
    const files = [...event.target.files].map(file => [file, file.webkitRelativePath || file.name]);
    event.target.value = ""; // so that the same file can be chosen again
    take(event, files, uploader);
  }, true);
  document.addEventListener("dragover", event => {
    if (event.dataTransfer.types.includes("Files")) event.preventDefault(); // else the browser would open the file
  });
  document.addEventListener("drop", event => {
    const uploader = uploaderOf(event.target) ?? picturesUploader();
    const items = [...event.dataTransfer.items].filter(item => item.kind === "file");
    if (!uploader || !items.length) return;
    event.target.dispatchEvent(new DragEvent("dragleave", { bubbles: true }));
    const entries = items.map(item => item.webkitGetAsEntry?.());
    const files = [...event.dataTransfer.files].map(file => [file, file.name]);
    take(event, entries.some(entry => entry?.isDirectory) ? [] : files, uploader);
    if (entries.some(entry => entry?.isDirectory)) {
      Promise.all(entries.filter(Boolean).map(filesOf)).then(found => add(found.flat(), uploader));
    }
  }, true);
  document.addEventListener("paste", event => {
    const files = [...event.clipboardData.files].map(file => [file, file.name]);
    if (files.length) take(event, files, picturesUploader());
  }, true);
  window.addEventListener("keydown", holdShortcut, true);
  new MutationObserver(() => {
    const connected = app().dataset.testConnectionState === "CONNECTED";
    if (connected && lost) report("reconnected", held); // runs the whole script; a fragment may be unknown by now
    lost = !connected;
    if (!running()) finishedAt = Date.now();
  }).observe(app(), { attributes: true, attributeFilter: ["data-test-connection-state", "data-test-script-state"] });
}

export default function ({ data, parentElement, setTriggerValue }) {
  // Later, because screen readers say only what changes in a live region that is already there.
  setTimeout(() => {
    const status = parentElement.querySelector("[role=status]");
    if (status.textContent !== data.status) status.textContent = data.status;
  }, POLL);
  if (!("limit" in data)) return; // in the dialog
  report = (name, value) => setTriggerValue(name, value);
  if (!installed) install();
  installed = true;
  limit = data.limit;
  if (app().dataset.testConnectionState === "CONNECTED") held = data.held;
}
