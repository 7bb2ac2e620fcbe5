// One crosshair for all charts of a group: pointing at a step shows its values in the heading of every chart, in the
// order of the legend.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const charts = [...document.querySelectorAll("figure.chart[data-height]")].map((figure) => {
    const area = figure.querySelector("svg.area");
    const output = figure.querySelector("output");
    const data = JSON.parse(figure.querySelector("script").textContent);
    const height = figure.dataset.height;
    const make = (tag, name) => {
      const element = document.createElementNS(SVG, tag);
      element.setAttribute("class", name);
      area.append(element);
      return element;
    };
    const line = make("line", "cross");
    line.setAttribute("y1", 0);
    line.setAttribute("y2", height);
    const marks = data.series.map((s) => make("circle", `mark ${s.style}`));
    marks.forEach((m) => m.setAttribute("r", 4));
    return { figure, area, output, data, line, marks, initialText: output.textContent };
  });

  const show = (step, group) => charts.filter((c) => c.data.group === group).forEach(({ figure, output, data, line, marks }) => {
    const percent = (s) => `${(100 * (s - data.from)) / (data.to - data.from)}%`;
    const nearestStep = nearest(data.series[0].points, step)[0];
    line.setAttribute("x1", percent(nearestStep));
    line.setAttribute("x2", percent(nearestStep));
    const values = data.series.map((s, i) => {
      const [x, value, y] = nearest(s.points, nearestStep);
      marks[i].setAttribute("cx", percent(x));
      marks[i].setAttribute("cy", y);
      return formatValue(value);
    });
    output.textContent = `${data.label.replace("{}", nearestStep.toLocaleString("en"))}: ${values.join(" · ")}`;
    figure.classList.add("pointed");
  });

  const hide = () => charts.forEach(({ figure, output, initialText }) => {
    output.textContent = initialText;
    figure.classList.remove("pointed");
  });

  charts.forEach(({ area, data }) => {
    area.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect();
      const fraction = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      show(data.from + fraction * (data.to - data.from), data.group);
    });
    area.addEventListener("pointerleave", hide);
  });
})();
