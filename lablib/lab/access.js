// What ipywidgets, Plotly and JupyterLab leave to be done for a reader with a keyboard or a screen
// reader. It runs once a page, however often it is shown, and stays when a control is drawn later.
(() => {
  if (window.lablibAccess) return;
  window.lablibAccess = true;
  const PANELS = '.lablib-explore, .lablib-predict, .lablib-show-me';
  let groups = 0;

  // A number beside a slider can be typed over, and its handle moved: neither says what it is.
  const nameSlider = slider => {
    const words = slider.querySelector('.widget-label')?.textContent.trim() || 'value';
    for (const handle of slider.querySelectorAll('.noUi-handle'))
      handle.setAttribute('aria-label', words);
    const number = slider.querySelector('.widget-readout');
    number?.setAttribute('role', 'textbox');
    number?.setAttribute('aria-label', `${words}, as a number`);
  };

  // Radio buttons of one name are one stop of Tab, and arrow keys go through them.
  const nameRadios = box => {
    const output = box.closest('.jp-OutputArea-child');
    box.setAttribute('role', 'radiogroup');
    box.setAttribute('aria-label', output?.previousElementSibling?.innerText.trim() || 'your guess');
    groups += 1;
    for (const radio of box.querySelectorAll('input')) radio.name = `lablib-${groups}`;
  };

  // A plot's alternative is a text in it that nobody sees; see alternatives.py.
  const describe = plot => {
    const place = (plot.layout?.annotations || []).findIndex(one => one.name === 'alternative');
    const words = plot.querySelector(`.annotation[data-index="${place}"] text`)?.textContent;
    if (!words) return;
    plot.querySelectorAll('.main-svg').forEach((svg, layer) => {
      if (layer) return svg.setAttribute('aria-hidden', 'true');
      svg.setAttribute('role', 'img');
      svg.setAttribute('aria-label', words);
    });
    if (plot.dataset.told === words) return;
    plot.dataset.told = words;
    announce(plot, words);
  };

  // A picture that the reader's hand moved is read out, when the hand is still on its control.
  const news = document.createElement('div');
  news.setAttribute('role', 'status');
  news.style = 'position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)';
  document.body.append(news);
  const announce = (plot, words) => {
    const mine = document.activeElement?.closest('.lablib-explore')?.closest('.jp-OutputArea');
    if (mine?.contains(plot)) news.textContent = words;
  };

  const todo = [
    ['.lablib-explore .widget-slider, .lablib-predict .widget-slider', nameSlider],
    ['.lablib-predict .widget-radio-box:not([role])', nameRadios],
    ['.js-plotly-plot', describe],
    // JupyterLab's stored image of a plot has no alternative; under the pointer it is drawn anew.
    ['img.plot-img[src]:only-child', image => image.dispatchEvent(new Event('mouseenter'))],
  ];
  const look = () => todo.forEach(([which, act]) => document.querySelectorAll(which).forEach(act));
  let waiting = 0;
  new MutationObserver(() => {
    waiting ||= setTimeout(() => { waiting = 0; look(); }, 100);
  }).observe(document.body, { childList: true, subtree: true });
  look();

  // JupyterLab's one-letter shortcuts and arrow keys would cut the cell or leave the control.
  window.addEventListener('keydown', event => {
    if (!event.target.closest?.(PANELS)) return;
    const meant = event.ctrlKey || event.metaKey || event.altKey
      || (event.shiftKey && event.key === 'Enter');
    event.target.toggleAttribute('data-lm-suppress-shortcuts', !meant);
  }, true);
})();
