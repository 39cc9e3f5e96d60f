// What Gradio says to a Chinese browser in English, and what it does not translate of ours.
(() => {
  if (!/^zh\b/i.test(navigator.language)) return;
  // Gradio knows zh-CN and zh-TW only.
  if (!/^zh-(CN|TW)$/.test(navigator.language))
    Object.defineProperty(navigator, "language", { value: "zh-CN" });
  const texts = [
    [/^Error$/, "错误"],
    [/^Warning$/, "提示"],
    [/^File\(s\) exceed the maximum allowed size of (.*?): (.*)$/, "文件超过 $1 的大小上限：$2"],
    [/^Invalid file types?: (.*)\. Only .* allowed\.$/, "不支持这种文件：$1"],
    [/^This application is currently busy\..*$/, "正在提问的人太多，请稍后再试"],
    [/^Queue is full\..*$/, "正在提问的人太多，请稍后再试"],
    [/^default$/, "默认"],
    [/^yes$/, "是"],
    [/^no$/, "否"],
    [/^Connection errored out\.$/, "与服务器的连接出错，请重试"],
    [/^Connection to the server was lost\..*$/, "与服务器的连接已断开，正在重新连接…"],
  ];
  const translate = (node) => {
    const english = node.data.trim();
    const found = texts.find(([pattern]) => pattern.test(english));
    if (found) node.data = english.replace(...found);
  };
  new MutationObserver(() => {
    for (const toast of document.querySelectorAll(".toast-body, #thinking")) {
      const walker = document.createTreeWalker(toast, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) translate(walker.currentNode);
    }
  }).observe(document, { childList: true, characterData: true, subtree: true });
})();
