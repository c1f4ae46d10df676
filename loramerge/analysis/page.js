(function () {
"use strict";
var data = JSON.parse(document.getElementById("data").textContent);
var root = document.documentElement;
var MOST_ROWS = 1500, MOST_CELLS = 4000;  // of what is drawn at once: models of experts have tens of thousands
var chosen = -1, redraw = [], moduleDraws = [];

// ---------------------------------------------------------------- small things

function byId(id) { return document.getElementById(id); }
function el(name, attributes, children) {
  var node = document.createElement(name);
  return fill(node, attributes, children);
}
function svg(name, attributes, children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}
function fill(node, attributes, children) {
  Object.keys(attributes || {}).forEach(function (key) { node.setAttribute(key, attributes[key]); });
  (children === undefined ? [] : [].concat(children)).forEach(function (child) {
    node.appendChild(typeof child === "object" ? child : document.createTextNode(String(child)));
  });
  return node;
}
function clear(node) { while (node.firstChild) { node.removeChild(node.firstChild); } return node; }
function show(value, form) {
  if (value === null || value === undefined) { return "–"; }
  if (form === "int") { return String(value); }
  if (form === "percent") { return significant(100 * value, 3) + " %"; }
  if (form === "signed") { return (value > 0 ? "+" : "") + value.toFixed(3); }
  if (form === "fixed") { return value.toFixed(3); }
  return significant(value, 3);
}
function significant(value, digits) {
  if (value === 0) { return "0"; }
  var size = Math.abs(value);
  if (size >= 1e5 || size < 1e-4) { return value.toExponential(digits - 1); }
  return String(Number(value.toPrecision(digits)));
}
function facts(rows, flowing) {
  var list = el("dl", {"class": "facts"});
  rows.forEach(function (row) {
    var both = [el("dt", {}, row[0]), el("dd", {}, row[1])];
    if (flowing) { list.appendChild(el("div", {}, both)); } else { both.forEach(function (node) { list.appendChild(node); }); }
  });
  return list;
}

// ---------------------------------------------------------------- colours

function stops() {
  var style = getComputedStyle(root);
  return ["--h0", "--h1", "--h2", "--h3", "--h4"].map(function (name) {
    var hex = style.getPropertyValue(name).trim();
    return [1, 3, 5].map(function (at) { return parseInt(hex.substr(at, 2), 16); });
  });
}
function colour(share, scale) {
  var at = Math.max(0, Math.min(0.9999, share)) * (scale.length - 1), low = Math.floor(at);
  var mixed = [0, 1, 2].map(function (k) { return Math.round(scale[low][k] + (at - low) * (scale[low + 1][k] - scale[low][k])); });
  return "rgb(" + mixed.join(",") + ")";
}
function isDark() {
  var told = root.getAttribute("data-theme");
  return told ? told === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}
function drawAll() { redraw.concat(moduleDraws).forEach(function (draw) { draw(); }); }
function setTheme(name) { root.setAttribute("data-theme", name); nameTheme(); drawAll(); }
function nameTheme() { byId("theme").textContent = isDark() ? "Light" : "Dark"; }

// ---------------------------------------------------------------- heat maps

function bytes(text) {
  var raw = atob(text), out = new Uint8Array(raw.length);
  for (var k = 0; k < raw.length; k++) { out[k] = raw.charCodeAt(k); }
  return out;
}
// table: {i, j, q: base64 bytes or v: numbers, c: chance numbers or d: dimension}
function heat(table, title, rows, columns) {
  var values = table.q ? Array.prototype.map.call(bytes(table.q), function (b) { return b / 255; }) : table.v;
  var p = table.i.length, q = table.j.length, side = 236, pad = 30, at = {a: p - 1, b: q - 1, on: false};
  var canvas = el("canvas", {tabindex: "0", role: "img"});
  var readout = el("div", {"class": "soft readout", "aria-live": "polite"});
  function chance(a, b) { return table.c ? table.c[a * q + b] : Math.min(1, Math.max(table.i[a], table.j[b]) / table.d); }
  function told(a, b) {
    return "i = " + table.i[a] + ", j = " + table.j[b] + ": " + values[a * q + b].toFixed(table.q ? 2 : 3) +
      " (chance " + significant(chance(a, b), 2) + ")";
  }
  canvas.setAttribute("aria-label", title + ", similarity from 0 to 1. Arrow keys read it out. " + told(p - 1, q - 1));
  function draw() {
    var ratio = window.devicePixelRatio || 1, scale = stops(), style = getComputedStyle(root);
    canvas.width = (side + pad) * ratio; canvas.height = (side + pad) * ratio;
    canvas.style.width = side + pad + "px"; canvas.style.aspectRatio = "1";
    var pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.fillStyle = style.getPropertyValue("--back").trim(); pen.fillRect(0, 0, side + pad, side + pad);
    var w = side / q, h = side / p;
    for (var a = 0; a < p; a++) { for (var b = 0; b < q; b++) {
      pen.fillStyle = colour(values[a * q + b], scale);
      // Whole device pixels: no seams between cells.
      var x0 = Math.round((pad + b * w) * ratio), x1 = Math.round((pad + (b + 1) * w) * ratio);
      var y0 = Math.round((p - 1 - a) * h * ratio), y1 = Math.round((p - a) * h * ratio);
      pen.fillRect(x0 / ratio, y0 / ratio, (x1 - x0) / ratio, (y1 - y0) / ratio);
    } }
    pen.fillStyle = style.getPropertyValue("--soft").trim(); pen.font = "11px sans-serif";
    pen.textAlign = "center";
    ticks(q).forEach(function (b) { pen.fillText(String(table.j[b]), Math.min(pad + (b + 0.5) * w, pad + side - 8), side + 13); });
    pen.fillText("j: " + columns, pad + side / 2, side + 24);
    pen.textAlign = "right";
    ticks(p).forEach(function (a) { pen.fillText(String(table.i[a]), pad - 3, Math.max(10, (p - 0.5 - a) * h + 4)); });
    pen.save(); pen.translate(9, side / 2); pen.rotate(-Math.PI / 2); pen.textAlign = "center"; pen.fillText("i: " + rows, 0, 0); pen.restore();
    if (at.on) {
      pen.strokeStyle = style.getPropertyValue("--s1").trim(); pen.lineWidth = 2;
      pen.strokeRect(pad + at.b * w + 1, (p - 1 - at.a) * h + 1, Math.max(2, w - 2), Math.max(2, h - 2));
    }
  }
  function move(a, b) { at = {a: a, b: b, on: true}; readout.textContent = told(a, b); draw(); }
  canvas.addEventListener("keydown", function (event) {
    var steps = {ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1]}[event.key];
    if (!steps) { return; }
    event.preventDefault();
    move(Math.max(0, Math.min(p - 1, at.a + steps[0])), Math.max(0, Math.min(q - 1, at.b + steps[1])));
  });
  canvas.addEventListener("pointermove", function (event) {
    var box = canvas.getBoundingClientRect(), grow = (side + pad) / box.width;
    var x = (event.clientX - box.left) * grow - pad, y = (event.clientY - box.top) * grow;
    if (x >= 0 && y < side) { move(Math.min(p - 1, p - 1 - Math.floor(y / (side / p))), Math.min(q - 1, Math.floor(x / (side / q)))); }
  });
  canvas.addEventListener("pointerleave", function () { at.on = false; readout.textContent = told(p - 1, q - 1); draw(); });
  readout.textContent = told(p - 1, q - 1);
  return {draw: draw, node: el("figure", {}, [el("figcaption", {}, title), canvas, readout])};
}
function ticks(count) {
  var made = [];
  [0, 1 / 3, 2 / 3, 1].forEach(function (share) {
    var at = Math.round(share * (count - 1));
    if (made.indexOf(at) < 0) { made.push(at); }
  });
  return made;
}
function heatScale() { return el("p", {"class": "scale"}, ["0 ", el("span", {"aria-hidden": "true"}), " 1"]); }

// ---------------------------------------------------------------- spectra

function spectra(lines, title) {
  var width = 420, height = 250, left = 48, top = 8, bottom = 30, right = 10;
  var most = 1, high = 0, low = Infinity;
  lines.forEach(function (line) {
    most = Math.max(most, line.x[line.x.length - 1]);
    line.y.forEach(function (y) { if (y > 0) { high = Math.max(high, y); low = Math.min(low, y); } });
  });
  if (!high) { return el("p", {"class": "soft"}, "All singular values are zero."); }
  var floor = Math.floor(Math.log10(Math.max(low, high * 1e-9))), ceil = Math.ceil(Math.log10(high));
  if (floor === ceil) { floor -= 1; }
  function px(x) { return left + (most === 1 ? 0.5 : (x - 1) / (most - 1)) * (width - left - right); }
  function py(y) { return top + (ceil - Math.max(floor, Math.log10(y))) / (ceil - floor) * (height - top - bottom); }
  var name = title + ": " + lines.map(function (l) { return l.name + " from " + significant(l.y[0], 3) + " to " + significant(l.y[l.y.length - 1], 3); }).join("; ");
  var picture = svg("svg", {viewBox: "0 0 " + width + " " + height, width: width, height: height, role: "img", "aria-label": name});
  var every = Math.ceil((ceil - floor) / 5);
  for (var e = floor; e <= ceil; e += every) {
    var y = py(Math.pow(10, e));
    picture.appendChild(svg("line", {x1: left, x2: width - right, y1: y, y2: y, "class": "grid"}));
    picture.appendChild(svg("text", {x: left - 5, y: y + 4, "text-anchor": "end"}, significant(Math.pow(10, e), 1)));
  }
  [1, Math.round((most + 1) / 2), most].filter(function (x, k, all) { return all.indexOf(x) === k; }).forEach(function (x) {
    picture.appendChild(svg("text", {x: px(x), y: height - 14, "text-anchor": "middle"}, x));
  });
  picture.appendChild(svg("text", {x: (left + width) / 2, y: height - 2, "text-anchor": "middle"}, "number of the singular value"));
  lines.forEach(function (line) {
    var points = line.x.map(function (x, k) { return line.y[k] > 0 ? px(x).toFixed(1) + "," + py(line.y[k]).toFixed(1) : ""; }).filter(Boolean);
    if (points.length === 1) { points.push(points[0]); }
    picture.appendChild(svg("polyline", {points: points.join(" "), "class": "line " + line.style, "stroke-linecap": "round"}));
    if (line.x.length <= 16) { points.forEach(function (point) {
      var xy = point.split(",");
      picture.appendChild(svg("circle", {cx: xy[0], cy: xy[1], r: 2, "class": "line " + line.style}));
    }); }
  });
  return picture;
}

// ---------------------------------------------------------------- one module

var SIDES = {right: "inputs (right vectors of B A)", left: "outputs (left vectors of B A)", A: "A alone (as the paper)", B: "B alone"};

function short(name) { var cut = name.replace(/\/+$/, ""); cut = cut.slice(cut.lastIndexOf("/") + 1); return cut.length > 18 ? cut.slice(0, 16) + "…" : cut; }
function adapterName(k) { return short(data.adapters[k].name) + (data.adapters.filter(function (a) { return short(a.name) === short(data.adapters[k].name); }).length > 1 ? " (" + (k + 1) + ")" : ""); }

function choose(index, jump) {
  var row = data.modules[index];
  chosen = index;
  moduleDraws = [];
  var box = clear(byId("module"));
  box.appendChild(el("h3", {}, row.name));
  box.appendChild(facts([["shape", row.shape.join(" × ")]].concat(data.columns.map(function (column, k) {
    return [column.label, show(row.cells[k], column.form)];
  })), true));
  var lines = [], legend = el("figcaption", {});
  row.s.forEach(function (s, k) {
    if (!s || !s.y.length) { return; }
    lines.push({x: s.x, y: s.y, name: adapterName(k), style: "l" + k % 4});
    legend.appendChild(el("span", {"class": "key k" + k % 4})); legend.appendChild(document.createTextNode(adapterName(k) + "  "));
  });
  var figures = el("div", {"class": "figures"});
  if (lines.length) {
    figures.appendChild(el("figure", {}, [el("figcaption", {}, "Singular values of the change"), spectra(lines, "Singular values of " + row.name), legend]));
  }
  (row.seven || []).forEach(function (table, k) {
    if (!table) { return; }
    var head = el("tr", {}, ["r", "change", "weight itself", "random"].map(function (h) { return el("th", {scope: "col"}, h); }));
    var body = table.map(function (line) { return el("tr", {}, line.map(function (v, at) { return el("td", {}, show(v, at ? "" : "int")); })); });
    figures.appendChild(el("figure", {}, [
      el("figcaption", {}, "Size of the weight on the r leading directions of " + adapterName(k) + ", of itself, of chance"),
      el("table", {"class": "seven"}, [el("thead", {}, head), el("tbody", {}, body)])]));
  });
  box.appendChild(figures);
  function add(name, tables, rows, columns) {
    var group = el("div", {"class": "figures heats"});
    Object.keys(SIDES).forEach(function (side) {
      if (!tables[side]) { return; }
      var made = heat(tables[side], SIDES[side], rows, columns);
      moduleDraws.push(made.draw); group.appendChild(made.node);
    });
    if (!group.firstChild) { return; }
    box.appendChild(el("h3", {}, name)); box.appendChild(group); box.appendChild(heatScale());
  }
  (row.phi || []).forEach(function (pair) {
    add("Similarity of " + adapterName(pair.a) + " and " + adapterName(pair.b), pair, adapterName(pair.a), adapterName(pair.b));
  });
  (row.base || []).forEach(function (tables, k) {
    if (tables) { add("Similarity of the weight's own directions and " + adapterName(k), tables, "weight", adapterName(k)); }
  });
  moduleDraws.forEach(function (draw) { draw(); });
  document.querySelectorAll("#map button[data-row]").forEach(function (button) {
    button.setAttribute("aria-pressed", String(Number(button.getAttribute("data-row")) === index));
  });
  document.querySelectorAll("#table tbody tr").forEach(function (line) {
    line.classList.toggle("chosen", Number(line.getAttribute("data-row")) === index);
  });
  if (jump) { byId("h-module").focus(); byId("detail").scrollIntoView(); }
}

// ---------------------------------------------------------------- the map of the model

function places() {
  // One row a name with its first number taken out, one column a number: the layer, in nearly all models.
  var lines = {}, order = [], columns = {};
  data.modules.forEach(function (row, index) {
    var match = /^(.*?)(\d+)(.*)$/.exec(row.name);
    var key = match ? match[1] + "#" + match[3] : row.name, column = match ? Number(match[2]) : 0;
    if (!lines[key]) { lines[key] = {}; order.push(key); }
    lines[key][column] = index; columns[column] = true;
  });
  return {lines: lines, order: order, columns: Object.keys(columns).map(Number).sort(function (a, b) { return a - b; })};
}
function drawMap() {
  var at = Number(byId("metric").value), scale = stops(), low = Infinity, high = -Infinity, column = data.columns[at];
  data.modules.forEach(function (row) { var v = row.cells[at]; if (v !== null) { low = Math.min(low, v); high = Math.max(high, v); } });
  document.querySelectorAll("#map button[data-row]").forEach(function (button) {
    var row = data.modules[Number(button.getAttribute("data-row"))], v = row.cells[at];
    button.style.background = v === null ? "" : colour(high > low ? (v - low) / (high - low) : 0.5, scale);
    var text = row.name + ": " + column.label + " " + show(v, column.form);
    button.title = text; button.setAttribute("aria-label", text);
  });
  var line = clear(byId("map-scale"));
  if (high >= low) { fill(line, {}, [show(low, column.form), el("span", {"aria-hidden": "true"}), show(high, column.form)]); }
}
function buildMap() {
  if (data.modules.length > MOST_CELLS) { byId("across").hidden = true; return; }
  var found = places(), table = el("table", {}), head = el("tr", {}, el("th", {}, ""));
  found.columns.forEach(function (c) { head.appendChild(el("th", {scope: "col"}, c % 4 === 0 || found.columns.length < 9 ? c : "")); });
  table.appendChild(el("thead", {}, head));
  var body = el("tbody", {}), buttons = [];
  found.order.forEach(function (key, y) {
    var label = key.replace(/^.*#\.?/, "") || key, line = el("tr", {}, el("th", {scope: "row", title: key}, label));
    found.columns.forEach(function (c, x) {
      var index = found.lines[key][c], cell = el("td", {});
      if (index !== undefined) {
        var button = el("button", {type: "button", "data-row": index, "data-x": x, "data-y": y, tabindex: buttons.length ? "-1" : "0", "aria-pressed": "false"});
        button.addEventListener("click", function () { choose(index, false); });
        buttons.push(button); cell.appendChild(button);
      }
      line.appendChild(cell);
    });
    body.appendChild(line);
  });
  table.appendChild(body);
  // One stop for the tab key; arrows move in the grid.
  table.addEventListener("keydown", function (event) {
    var steps = {ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowRight: [1, 0], ArrowLeft: [-1, 0]}[event.key];
    var now = event.target;
    if (!steps || !now.hasAttribute("data-row")) { return; }
    event.preventDefault();
    var x = Number(now.getAttribute("data-x")), y = Number(now.getAttribute("data-y"));
    for (;;) {
      x += steps[0]; y += steps[1];
      if (x < 0 || y < 0 || x >= found.columns.length || y >= found.order.length) { return; }
      var next = table.querySelector('button[data-x="' + x + '"][data-y="' + y + '"]');
      if (next) { now.tabIndex = -1; next.tabIndex = 0; next.focus(); return; }
    }
  });
  byId("map").appendChild(table);
  data.columns.forEach(function (column, k) { byId("metric").appendChild(el("option", {value: k}, column.label)); });
  byId("metric").value = String(data.metric);
  byId("metric").addEventListener("change", drawMap);
  redraw.push(drawMap);
}

// ---------------------------------------------------------------- the table

var order = data.modules.map(function (row, k) { return k; }), sorted = -2, down = false;

function drawTable() {
  var wanted = byId("filter").value.toLowerCase(), body = clear(document.querySelector("#table tbody")), count = 0;
  order.forEach(function (index) {
    var row = data.modules[index];
    if (wanted && row.name.toLowerCase().indexOf(wanted) < 0) { return; }
    count += 1;
    if (count > MOST_ROWS) { return; }
    var button = el("button", {type: "button"}, row.name);
    button.addEventListener("click", function () { choose(index, true); });
    var line = el("tr", {"data-row": index}, el("td", {}, button));
    line.appendChild(el("td", {}, row.shape.join("×")));
    data.columns.forEach(function (column, k) { line.appendChild(el("td", {}, show(row.cells[k], column.form))); });
    if (index === chosen) { line.classList.add("chosen"); }
    body.appendChild(line);
  });
  var first = count > MOST_ROWS ? "the first " + MOST_ROWS + " of " : "";
  byId("shown").textContent = first + (count === data.modules.length ? "" : count + " of ") + data.modules.length + " modules";
}
function sortBy(at) {
  down = sorted === at ? !down : at >= 0;
  sorted = at;
  function value(index) {
    var row = data.modules[index];
    return at === -2 ? index : at === -1 ? row.shape[0] * row.shape[1] : row.cells[at];
  }
  order.sort(function (a, b) {
    var x = value(a), y = value(b);
    if (x === null || y === null) { return x === y ? a - b : x === null ? 1 : -1; }
    return (down ? y - x : x - y) || a - b;
  });
  document.querySelectorAll("#table thead th").forEach(function (head, k) {
    if (k - 2 === at) { head.setAttribute("aria-sort", down ? "descending" : "ascending"); } else { head.removeAttribute("aria-sort"); }
  });
  drawTable();
}
function buildTable() {
  var head = el("tr", {});
  [{label: "module", title: "in the order of the model"}, {label: "shape", title: "outputs × inputs"}].concat(data.columns).forEach(function (column, k) {
    var button = el("button", {type: "button", title: column.title}, column.label);
    button.addEventListener("click", function () { sortBy(k - 2); });
    head.appendChild(el("th", {scope: "col"}, button));
  });
  document.querySelector("#table thead").appendChild(head);
  byId("filter").addEventListener("input", drawTable);
  head.firstChild.setAttribute("aria-sort", "ascending");
  drawTable();
}

// ---------------------------------------------------------------- the page

data.summary.forEach(function (line) { byId("summary").appendChild(el("li", {}, line)); });
data.adapters.forEach(function (adapter, k) {
  byId("adapters").appendChild(el("div", {"class": "card"}, [
    el("h3", {}, [el("span", {"class": "key k" + k % 4}), adapter.name]), facts(adapter.facts)]));
});
if (data.base) { byId("adapters").appendChild(el("div", {"class": "card"}, [el("h3", {}, "Base: " + data.base.name), facts(data.base.facts)])); }
data.pairs.forEach(function (pair) {
  var box = byId("pairs"), group = el("div", {"class": "figures heats"});
  box.hidden = false;
  box.appendChild(el("h3", {}, adapterName(pair.a) + " and " + adapterName(pair.b)));
  box.appendChild(facts(pair.facts));
  Object.keys(SIDES).forEach(function (side) {
    if (!pair.phi[side]) { return; }
    var made = heat(pair.phi[side], SIDES[side] + ", mean of " + pair.phi[side].n, adapterName(pair.a), adapterName(pair.b));
    redraw.push(made.draw); group.appendChild(made.node);
  });
  if (group.firstChild) {
    box.appendChild(el("p", {"class": "soft"}, "Similarity φ(i, j) of the subspaces of the i and j leading directions: 1 where one holds the other, 0 where they are orthogonal."));
    box.appendChild(group); box.appendChild(heatScale());
  }
});
data.skipped.forEach(function (line) {
  byId("skipped").hidden = false;
  byId("skipped").querySelector("ul").appendChild(el("li", {}, line));
});
data.words.forEach(function (word) { byId("words").appendChild(el("dt", {}, word[0])); byId("words").appendChild(el("dd", {}, word[1])); });
buildMap();
buildTable();
nameTheme();
drawAll();
if (data.modules.length) { choose(data.first, false); }
byId("theme").addEventListener("click", function () { setTheme(isDark() ? "light" : "dark"); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", function () { nameTheme(); drawAll(); });
var before = null;
addEventListener("beforeprint", function () { before = root.getAttribute("data-theme"); root.setAttribute("data-theme", "light"); drawAll(); });
addEventListener("afterprint", function () { if (before) { root.setAttribute("data-theme", before); } else { root.removeAttribute("data-theme"); } drawAll(); });
})();
