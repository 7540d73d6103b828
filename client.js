// What the server cannot do: hand over many files in portions, take a pasted picture wherever the focus is, show at
// once that something has begun, and notice that the connection was lost. Mounted by app.py; all else is Python.

const PORTION_FILES = 100;
const PORTION_BYTES = 40e6; // so that the server never holds much more than its own limit
const POLL = 200; // ms

const queue = []; // [file, uploader's class] that the server has not been given yet
let total = 0; // files in the queue since it was last empty
let fedAt = 0;
let timer = null;
let limit = Infinity; // bytes of one file
let held = 0; // pictures that the server held when it was last heard of
let lost = false;
let report = () => {};
const seen = new WeakSet(); // chips of failed uploads that were reported

const all = selector => [...document.querySelectorAll(selector)];
const app = () => document.querySelector("[data-testid=stApp]");

function show() {
  const bar = document.querySelector(".st-key-client progress");
  if (!bar) return;
  bar.hidden = timer === null;
  if (total > PORTION_FILES) bar.value = 1 - queue.length / total;
  else bar.removeAttribute("value");
}

function add(files, uploader) {
  const tooLarge = files.filter(file => file.size > limit);
  if (tooLarge.length) report("refused", tooLarge.map(file => [file.webkitRelativePath || file.name, file.size, ""]));
  const good = files.filter(file => file.size <= limit && !file.name.startsWith(".")); // a folder's hidden files
  good.sort((one, other) => one.webkitRelativePath.localeCompare(other.webkitRelativePath)); // no change without a folder
  if (!good.length) return;
  queue.push(...good.map(file => [file, uploader]));
  total += good.length;
  fedAt = fedAt || 1;
  timer ??= setInterval(feed, POLL);
  feed();
}

// Give Streamlit's uploader the next files, once it and the script are done with the last ones.
function feed() {
  const failed = all("[data-testid=stFileChip][aria-invalid]").filter(chip => !seen.has(chip));
  failed.forEach(chip => seen.add(chip));
  if (failed.length) {
    report("refused", failed.map(chip => [chip.querySelector("[title]")?.title ?? "", 0, "did not arrive"]));
  }
  const busy = all("[data-testid=stFileChipIconSpinner]").length || app().dataset.testScriptState !== "notRunning";
  if (!busy && Date.now() - fedAt > 3 * POLL) {
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
      fedAt = Date.now();
      input.files = portion.files;
      const event = new Event("change", { bubbles: true });
      event.fromQueue = true;
      input.dispatchEvent(event);
    } else {
      clearInterval(timer);
      timer = null;
      total = fedAt = 0;
      queue.length = 0;
    }
  }
  show();
}

const uploaderOf = element => /st-key-(pictures|folder)-\d+/.exec(element.closest("[class*=st-key-pictures-], [class*=st-key-folder-]")?.className ?? "")?.[0];

function take(event, files, uploader) {
  event.preventDefault();
  event.stopImmediatePropagation();
  add([...files], uploader);
}

function install() {
  document.addEventListener("change", event => {
    const uploader = event.target.type === "file" && uploaderOf(event.target);
    if (!uploader || event.fromQueue || !event.target.files.length) return;
    const files = [...event.target.files];
    event.target.value = ""; // so that the same file can be chosen again
    take(event, files, uploader);
  }, true);
  document.addEventListener("drop", event => {
    const uploader = uploaderOf(event.target);
    const folders = [...event.dataTransfer.items].some(item => item.webkitGetAsEntry?.()?.isDirectory);
    if (!uploader || folders || !event.dataTransfer.files.length) return;
    event.target.dispatchEvent(new DragEvent("dragleave", { bubbles: true }));
    take(event, event.dataTransfer.files, uploader);
  }, true);
  document.addEventListener("paste", event => {
    const uploader = uploaderOf(document.querySelector("[class*=st-key-pictures-] input[type=file]"));
    if (event.clipboardData.files.length) take(event, event.clipboardData.files, uploader);
  }, true);
  new MutationObserver(() => {
    const connected = app().dataset.testConnectionState === "CONNECTED";
    if (connected && lost) report("reconnected", held); // runs the whole script; a fragment may be unknown by now
    lost = !connected;
  }).observe(app(), { attributes: true, attributeFilter: ["data-test-connection-state"] });
}

export default function ({ data, parentElement, setTriggerValue }) {
  if (!report.installed) install();
  report = (name, value) => setTriggerValue(name, value);
  report.installed = true;
  limit = data.limit;
  if (app().dataset.testConnectionState === "CONNECTED") held = data.held;
  const status = parentElement.querySelector("[role=status]");
  if (status.textContent !== data.status) status.textContent = data.status;
}
