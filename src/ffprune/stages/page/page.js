// A figure keeps the width that it was drawn in; paper is narrower than most windows. A4 without its margins, in pixels:
const paper = 685;
const plots = () => document.querySelectorAll(".js-plotly-plot");

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details.print:not([open])")) {
    details.open = true;
    details.dataset.opened = "";
  }
  for (const plot of plots()) {
    const size = plot.closest(".two") ? { width: (paper - 16) / 2, height: 340 } : { width: paper, height: 280 };
    Plotly.relayout(plot, { autosize: false, ...size });
  }
});

addEventListener("afterprint", () => {
  for (const details of document.querySelectorAll("details[data-opened]")) {
    details.open = false;
    delete details.dataset.opened;
  }
  for (const plot of plots()) {
    Plotly.relayout(plot, { autosize: true, width: null, height: null });
  }
});
