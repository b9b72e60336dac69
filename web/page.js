() => {
    const find = (id) => document.getElementById(id), isShown = (element) => element && element.offsetParent;
    const keys = {a: "vote-a", b: "vote-b", t: "vote-t", s: "vote-s", u: "undo", Escape: "stop"};
    document.addEventListener("keydown", (event) => {
        const isTyping = event.target.closest("input, textarea") && event.key !== "Escape";
        if (isTyping || event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
        if (keys[event.key] && isShown(find(keys[event.key]))) find(keys[event.key]).click();
    });
    // after an answer, the keys of the vote must reach the page, and else the next question its box
    window.focusNext = () => isShown(find("vote-a")) ? document.activeElement.blur()
        : document.querySelector("#question textarea").focus();
    let isAtEnd = true;                      // the newest answer stays in sight, unless the reader scrolls up
    document.addEventListener("scroll", ({target: box}) => {
        if (box.id === "talk") isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    }, true);
    new MutationObserver(() => { if (isAtEnd && find("talk")) find("talk").scrollTop = 1e9; })
        .observe(document.body, {subtree: true, childList: true, characterData: true});
}
