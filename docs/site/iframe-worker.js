// Browsers start no Worker on a page that was opened from a disk. The search's runs in a hidden frame there.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.onmessage = null
      this.waiting = []
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.inside = frame.contentWindow
      this.inside.postMessage = data => this.receive(data) // what the script in the frame posts
      this.inside.importScripts = (...urls) =>
        urls.reduce((before, next) => before.then(() => this.load(next)), Promise.resolve())
      this.load(url).then(() => {
        this.ready = true
        this.waiting.forEach(data => this.postMessage(data))
      })
    }
    load(url) {
      const script = this.inside.document.createElement("script")
      script.src = new URL(url, location.href)
      return new Promise((loaded, failed) => {
        script.onload = loaded
        script.onerror = failed
        this.inside.document.body.appendChild(script)
      })
    }
    receive(data) {
      const event = new MessageEvent("message", { data: structuredClone(data) })
      if (this.onmessage) this.onmessage(event)
      this.dispatchEvent(event)
    }
    postMessage(data) {
      if (!this.ready) return this.waiting.push(data)
      const event = new this.inside.MessageEvent("message", { data: structuredClone(data) })
      setTimeout(() => this.inside.dispatchEvent(event))
    }
    terminate() {
      this.inside.frameElement.remove()
    }
  }
