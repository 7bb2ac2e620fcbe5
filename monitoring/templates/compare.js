// Draws the charts of compare.html: a curve of each shown run, against steps, tokens or time. Rows of a curve are
// those of monitoring/run_curves.py: [step, tokens, seconds, count, mean, lowest, highest].
(() => {
  const SVG = "http://www.w3.org/2000/svg", TOP = 8, HEIGHT = 200;
  const COUNT = 3, MEAN = 4, LOWEST = 5, HIGHEST = 6;
  const MOST_DOTS = 40; // evaluations of a run that get a dot each

  const { runs, plots, windows } = JSON.parse(document.getElementById("comparison").textContent);
  const [xAxis, xLog, smoothing, windowText] = ["x-axis", "x-log", "smoothing", "window"].map((id) => document.getElementById(id));
  const tableRows = [...document.querySelectorAll("tr[data-run]")];
  const styles = tableRows.map((row) => row.querySelector(".run").getAttribute("class"));
  const figures = [...document.querySelectorAll("figure[data-plot]")];

  const add = (parent, tag, attributes, text = "") => {
    const element = document.createElementNS(SVG, tag);
    Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
    element.textContent = text;
    parent.append(element);
    return element;
  };
  const percent = (share) => `${(100 * share).toFixed(2)}%`;
  const pixel = (share) => TOP + (1 - share) * (HEIGHT - TOP);
  const isShown = (index) => tableRows[index].querySelector(".shown").checked;

  // Return [row, mean of the last steps, their number] of each row: at least `size` steps, fewer at the beginning.
  const runningMean = (rows, size) => {
    let first = 0, count = 0, sum = 0;
    return rows.map((row) => {
      count += row[COUNT];
      sum += row[COUNT] * row[MEAN];
      for (; count - rows[first][COUNT] >= size; first++) {
        count -= rows[first][COUNT];
        sum -= rows[first][COUNT] * rows[first][MEAN];
      }
      return [row, sum / count, count];
    });
  };

  // Return how many steps a point of the smoothed charts sums up. In long runs each row has several steps.
  const describeWindow = (size) => {
    const noisy = plots.filter((plot) => plot.is_noisy);
    const shown = runs.filter((_, index) => isShown(index)).flatMap((run) => noisy.map((plot) => run.curves[plot.column] || []));
    const counts = shown.flatMap((rows) => runningMean(rows, size).map(([, , count]) => count)).filter((count) => count >= size);
    const [fewest, most] = [Math.min, Math.max].map((choose) => counts.reduce((a, b) => choose(a, b), counts[0]));
    const text = (count) => count.toLocaleString("en");
    if (size > 1 && !counts.length) return "mean of all steps so far"; // the runs are shorter
    if (size === 1) return most === 1 || !counts.length ? "off" : `off; a point is the mean of up to ${text(most)} steps`;
    return fewest === most ? `mean of ${text(most)} steps` : `mean of ${text(fewest)} to ${text(most)} steps`;
  };

  // Return the curves that a chart shows now: {index, points: [[x, y]], spans: [[x, lowest, highest]], raw: [[x, y]]}.
  const visibleCurves = (plot, isLog) => {
    const column = Number(xAxis.value), size = plot.is_noisy ? windows[smoothing.value] : 1;
    const isOnAxes = ([x, y]) => (x > 0 || !xLog.checked) && (y > 0 || !isLog);
    return runs.map((run, index) => {
      const rows = isShown(index) ? run.curves[plot.column] || [] : [];
      const raw = rows.map((row) => [row[column], row[MEAN]]).filter(isOnAxes);
      const smooth = size > 1 ? runningMean(rows, size).map(([row, mean]) => [row[column], mean]).filter(isOnAxes) : raw;
      const spans = rows.filter((row) => row[COUNT] > 1).map((row) => [row[column], row[LOWEST], row[HIGHEST]]);
      return { index, points: smooth, spans: spans.filter(isOnAxes), raw: size > 1 ? raw : [] };
    }).filter((curve) => curve.points.length);
  };

  // Draw the axes of a chart, and return the SVG for its curves: x is 0 to 1000, y is in pixels from the top.
  const drawAxes = (figure, x, y) => {
    const labels = figure.querySelector(".labels"), area = figure.querySelector(".area");
    labels.replaceChildren();
    area.replaceChildren();
    y.ticks.forEach(([value, label]) => {
      const at = pixel(y.share(value));
      add(labels, "text", { x: 54, y: at, dy: 4, "text-anchor": "end" }, label);
      add(area, "line", { class: "grid", x1: 0, x2: "100%", y1: at, y2: at });
    });
    add(area, "line", { class: "base", x1: 0, x2: "100%", y1: HEIGHT, y2: HEIGHT });
    x.ticks.forEach(([value, label]) => {
      const share = x.share(value), anchor = share < 0.04 ? "start" : share > 0.96 ? "end" : "middle";
      add(area, "text", { x: percent(share), y: HEIGHT + 18, "text-anchor": anchor }, label);
    });
    return add(area, "svg", { viewBox: `0 0 1000 ${HEIGHT}`, preserveAspectRatio: "none", width: "100%", height: HEIGHT });
  };

  // Draw a curve. Strokes from the lowest to the highest value show rows of several steps.
  const drawCurve = (svg, curve, x, y, hasDots) => {
    const left = (value) => (1000 * x.share(value)).toFixed(1), top = (value) => pixel(y.share(value)).toFixed(1);
    const line = (points) => points.map(([a, b], i) => `${i ? "L" : "M"}${left(a)},${top(b)}`).join("") + (points.length === 1 ? "h0" : "");
    const strokes = curve.spans.map(([a, low, high]) => `M${left(a)},${top(low)}V${top(high)}`).join("");
    const draw = (name, d) => add(svg, "path", { class: `${styles[curve.index]} ${name}`, d, "data-run": curve.index });
    const isSmooth = curve.raw.length > 0;
    if (isSmooth) draw("raw", line(curve.raw) + strokes);
    draw("curve", line(curve.points) + (isSmooth ? "" : strokes));
    if (hasDots || curve.points.length === 1) draw("points", curve.points.map(([a, b]) => `M${left(a)},${top(b)}h0`).join(""));
  };

  const drawn = new Map(); // of each figure: {curves, x, format, cross}

  const draw = (figure) => {
    const plot = plots[figure.dataset.plot], isLog = figure.querySelector(".y-log").checked;
    const curves = visibleCurves(plot, isLog);
    drawn.delete(figure);
    if (!curves.length) {
      figure.querySelectorAll(".labels, .area").forEach((svg) => svg.replaceChildren());
      add(figure.querySelector(".area"), "text", { x: "50%", y: HEIGHT / 2, "text-anchor": "middle" }, "no value to show");
      return;
    }
    const shown = curves.flatMap((curve) => [...curve.points, ...curve.raw]);
    const heights = [...shown.map(([, y]) => y), ...curves.flatMap((curve) => curve.spans.flatMap(([, low, high]) => [low, high]))];
    const totals = shown.map(([x]) => x);
    const format = totalFormat(Number(xAxis.value), totals.reduce((a, b) => Math.max(a, b)));
    const x = totalAxis(totals, xLog.checked, format), y = valueAxis(heights, isLog, plot.has_zero);
    const svg = drawAxes(figure, x, y);
    curves.forEach((curve) => drawCurve(svg, curve, x, y, plot.column === "eval_loss" && curve.points.length <= MOST_DOTS));
    const cross = add(figure.querySelector(".area"), "line", { class: "cross", y1: 0, y2: HEIGHT });
    drawn.set(figure, { curves, x, format, cross });
  };

  const drawAll = () => {
    windowText.textContent = describeWindow(windows[smoothing.value]);
    figures.forEach(draw);
  };

  // Show the values near a position in the chart that is pointed at, and a line at that position in every chart.
  const point = (figure, share) => {
    const { curves, x, format } = drawn.get(figure), at = x.value(share);
    drawn.forEach(({ x: axis, cross }) => {
      const there = axis.share(at);
      cross.classList.toggle("there", there >= 0 && there <= 1);
      cross.setAttribute("x1", percent(there));
      cross.setAttribute("x2", percent(there));
    });
    const isInRange = ({ points }) => x.share(points[points.length - 1][0]) > share - 0.01 && x.share(points[0][0]) < share + 0.01;
    const values = curves.filter(isInRange).map(({ index, points }) => [index, nearest(points, at)[1]]);
    const tip = figure.querySelector(".tip");
    tip.replaceChildren(document.createElement("b"), ...values.sort((a, b) => b[1] - a[1]).map(([index, value]) => {
      const line = document.createElement("div"), name = document.createElement("span"), number = document.createElement("span");
      name.append(tableRows[index].querySelector(".stroke").cloneNode(true), runs[index].name);
      number.textContent = formatValue(value);
      line.append(name, number);
      return line;
    }));
    tip.firstChild.textContent = `${xAxis.value === "0" ? "step " : ""}${format.label(xAxis.value === "0" ? Math.round(at) : at / format.unit)}${xAxis.value === "1" ? " tokens" : ""}`;
    tip.hidden = false;
    tip.style.left = share < 0.5 ? `calc(62px + ${percent(share * 0.9)} + 8px)` : "";
    tip.style.right = share < 0.5 ? "" : `calc(${percent((1 - share) * 0.9)} + 14px)`;
  };

  const leave = () => {
    drawn.forEach(({ cross }) => cross.classList.remove("there"));
    figures.forEach((figure) => { figure.querySelector(".tip").hidden = true; });
  };

  figures.forEach((figure) => {
    const area = figure.querySelector(".area");
    area.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect();
      if (drawn.has(figure)) point(figure, Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
    });
    area.addEventListener("pointerleave", leave);
    figure.querySelector(".y-log").addEventListener("change", () => draw(figure));
  });
  [xAxis, xLog, smoothing].forEach((input) => input.addEventListener("input", drawAll));
  tableRows.forEach((row, index) => {
    row.querySelector(".shown").addEventListener("change", drawAll);
    row.addEventListener("pointerenter", () => {
      document.body.classList.add("pointed-out");
      document.querySelectorAll("path.run").forEach((path) => path.classList.toggle("chosen", path.dataset.run === String(index)));
    });
    row.addEventListener("pointerleave", () => document.body.classList.remove("pointed-out"));
  });
  drawAll();
})();
