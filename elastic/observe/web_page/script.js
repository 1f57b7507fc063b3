"use strict";
// Shows /live.json, which has the state that `elastic top` shows. All text goes through textContent: names come from other machines.
const EVERY_MS = 1000, OLD_S = 3, SLOW = 1.3, SVG = "http://www.w3.org/2000/svg";
const at = (id) => document.getElementById(id);

function make(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}
function row(cells, kind) {
  const made = make("tr", undefined, kind);
  for (const cell of cells) made.append(cell instanceof Node ? cell : make("td", cell));
  return made;
}
function size(count) {
  for (const [unit, factor] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (count >= factor) return `${+(count / factor).toPrecision(3)} ${unit}`;
  return `${Math.round(count)} B`;
}
const seconds = (value) => value === null ? "" : value >= 1 ? `${value.toFixed(1)} s` : `${Math.round(value * 1000)} ms`;
const number = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits });
const clock = (time) => new Date(time * 1000).toLocaleTimeString("en-GB");

function doing(each) {
  if ("Tt".includes(each.state) && each.state) return "is stopped";
  const waits = each.waits_for === null ? "" : `, waits for ${each.waits_for}`;
  if (each.place === "train_fn") return `loop body${waits}`;
  const place = ["data loader", "checkpoint"].includes(each.place) ? `, in the ${each.place}` : "";
  return `${each.phase ?? "starts"}${each.micro_batch === null ? "" : ` ${each.micro_batch}`}${waits}${place}`;
}
function button(words, question, path, request) {
  const made = make("button", words), cell = make("td", undefined, "act");
  made.addEventListener("click", () => ask(question, path, request));
  cell.append(made);
  return cell;
}
function ask(question, path, request) {
  at("question").textContent = question;
  at("answer").textContent = at("secret").value = "";
  at("sure").onclick = async (event) => {
    event.preventDefault();
    at("answer").textContent = "...";
    const body = JSON.stringify({ ...request, secret: at("secret").value });
    const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body });
    at("answer").textContent = await answer.text();
    if (answer.ok) setTimeout(() => at("ask").close(), 1500);
  };
  at("ask").showModal();
}
function curve(svg, points) {
  const known = points.filter(([, value]) => Number.isFinite(value) && value !== null);
  svg.replaceChildren();
  if (known.length < 2) return;
  const [left, right, top, low] = [52, 512, 12, 124], values = known.map(([, value]) => value);
  const [first, last] = [known[0][0], known[known.length - 1][0]], least = Math.min(...values), most = Math.max(...values);
  const x = (step) => left + (right - left) * (step - first) / (last - first || 1);
  const y = (value) => low - (low - top) * (value - least) / (most - least || 1);
  const put = (name, attributes, text) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    svg.append(made);
  };
  for (const value of most > least ? [least, most] : [least]) {
    put("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) });
    put("text", { class: "axis", x: left - 6, y: y(value) + 4, "text-anchor": "end" }, String(+value.toPrecision(3)));
  }
  put("polyline", { class: "line", points: known.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ") });
  put("text", { class: "axis", x: left, y: 144 }, `step ${number(first)}`);
  put("text", { class: "axis", x: right, y: 144, "text-anchor": "end" }, number(last));
}
function achieved(job) {
  if (job.mfu !== null) return [[`${(100 * job.mfu).toFixed(1)} %`, "MFU"]];
  return job.flops_per_second ? [[`${+(job.flops_per_second / 1e9).toPrecision(3)}`, "GFLOP/s"]] : [];
}
function tiles(job) {
  const rate = job.tokens_per_second ? [number(job.tokens_per_second), "tokens/s"] : [number(job.samples_per_second ?? 0, 1), "samples/s"];
  const memory = job.workers.reduce((sum, each) => sum + (each.memory ?? 0), 0);
  const found = [[job.step === null ? "-" : `${number(job.step + 1)} of ${number(job.of)}`, "step"],
    [job.loss === null ? "-" : job.loss.toFixed(4), "loss"], rate, [seconds(job.seconds) || "-", "a step"],
    ...achieved(job), [String(job.workers.filter((each) => !each.spare).length), "workers"], [String(job.epoch), "epoch"],
    [String(job.incidents), "incidents"], [size(memory), "memory of all workers"]];
  at("tiles").replaceChildren(...found.map(([value, name]) => {
    const made = make("div", undefined, "tile");
    made.append(make("b", value), make("span", name, "soft"));
    return made;
  }));
}
function stages(job) {
  at("stages").replaceChildren(...job.stages.map(([start, stop, members], index) => {
    const made = make("div", undefined, "stage"), layers = stop - start === 1 ? `layer ${start}` : `layers ${start} to ${stop - 1}`;
    made.append(make("b", `stage ${index}`), make("span", `${layers}; worker${members.length > 1 ? "s" : ""} ${members.join(", ")}`, "soft"));
    return made;
  }));
}
function workers(job) {
  const stage = new Map(job.stages.flatMap(([, , members], index) => members.map((worker) => [worker, index])));
  const paces = job.workers.map((each) => each.step_s).filter(Boolean).sort((a, b) => a - b), usual = paces[Math.floor(paces.length / 2)];
  const newest = Math.max(...job.workers.filter((each) => !each.spare).map((each) => each.step ?? 0), 0);
  at("workers").replaceChildren(...job.workers.map((each) => {
    const late = each.step !== null && !each.spare && each.step < newest - 1, slow = each.step_s && usual && each.step_s > SLOW * usual;
    const trouble = late || slow || (each.state && "TtZD".includes(each.state));
    const cells = [String(each.worker), each.host, each.spare ? "spare" : String(stage.get(each.worker) ?? ""), doing(each)];
    cells.push(each.step === null ? "" : String(each.step), seconds(each.for_s), seconds(each.step_s), each.memory === null ? "" : size(each.memory));
    const question = `End the process of worker ${each.worker} on ${each.host}? The others go on without it, and a new worker takes its place.`;
    return row([...cells, button("kill", question, "kill", { worker: each.worker })], trouble ? "trouble" : "");
  }));
}
function hosts(job) {
  at("hosts").replaceChildren(...job.hosts.map((host) => {
    const count = job.workers.filter((each) => each.host === host.name).length;
    const marks = [...(host.name === job.coordinator ? ["coordinates"] : []), ...(host.draining ? ["is drained"] : [])].join(", ");
    const question = `Drain host ${host.name}? The others take over what its workers own, at the next step boundary; then its agent ends.`;
    return row([host.name, host.rack ?? "", String(count), marks, button("drain", question, "drain", { host: host.name })]);
  }));
}
function show(told) {
  document.body.classList.toggle("quiet", !told.acts || told.over);
  at("report").hidden = !told.report;
  const rows = told.events.slice().reverse().map((event) => row([clock(event.at), event.text]));
  at("events").replaceChildren(...rows);
  const job = told.standing;
  if (job === null) return;
  const age = told.now - job.at, old = !told.over && age > OLD_S;
  document.title = `${job.job}: step ${job.step === null ? "-" : job.step + 1}`;
  at("job").textContent = job.job;
  at("phase").textContent = told.over ? "has ended" : job.phase;
  at("phase").className = `verdict ${told.over || old ? "unknown" : job.phase === "running" ? "pass" : "unknown"}`;
  at("note").textContent = `${job.layout}${old ? `; as of ${Math.round(age)} s ago` : ""}`;
  tiles(job); stages(job); workers(job); hosts(job);
  curve(at("loss"), told.history.map(([step, loss]) => [step, loss]));
  curve(at("pace"), told.history.map(([step, , pace]) => [step, pace]));
  const slow = job.links.filter((link) => link[3] !== null).sort((a, b) => a[3] - b[3]).slice(0, 6);
  if (slow.length) at("links").textContent = slow.map(([a, b, late, rate]) => `${a}-${b} ${size(rate)}/s${late === null ? "" : `, ${(late * 1000).toPrecision(2)} ms`}`).join("; ");
}
async function look() {
  try {
    const told = await (await fetch("live.json")).json();
    show(told);
    if (told.over) return;
  } catch {
    at("note").textContent = "`elastic top --web` has ended, or cannot be reached.";
    at("phase").className = "verdict unknown";
  }
  setTimeout(look, EVERY_MS);
}
at("cancel").addEventListener("click", () => at("ask").close());
look();
