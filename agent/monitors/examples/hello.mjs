#!/usr/bin/env node
// A monitor in JavaScript, with nothing but Node: five digits, a space, and that many bytes.
let buffered = Buffer.alloc(0)
const say = text => process.stdout.write(`${String(Buffer.byteLength(text)).padStart(5, '0')} ${text}`)

const steps = {
  async Greet(config) {
    say(`Log Info Hello, ${config.Name ?? 'nobody'}`)
  },
  async Wait() {
    const began = performance.now()
    await new Promise(resolve => setTimeout(resolve, 20))
    return performance.now() - began // milliseconds
  }
}

let config = {}
async function take(message) {
  if (message.startsWith('Version ')) return say('Ready')
  if (message.startsWith('Config ')) {
    config = JSON.parse(message.slice(7))
    return say('Configured')
  }
  if (/^Run [Ss]tep /.test(message)) {
    const step = steps[message.slice(9)]
    try {
      if (!step) throw new Error(`there is no step ${message.slice(9)}`)
      const time = await step(config)
      // The small spelling, the older one, goes with times in seconds.
      return say(time === undefined ? 'Step OK' : `Step Time ${message.startsWith('Run step ') ? time / 1000 : time}`)
    } catch (error) {
      return say(`Step Error ${error.message}`)
    }
  }
  if (message.startsWith('Exit')) process.exit(0)
  say(`Log Error unexpected message ${message}`)
}

process.stdin.on('data', data => {
  buffered = Buffer.concat([buffered, data])
  while (buffered.length >= 6) {
    const length = Number(buffered.subarray(0, 5))
    if (buffered.length < 6 + length) break
    const message = buffered.subarray(6, 6 + length).toString()
    buffered = buffered.subarray(6 + length)
    take(message)
  }
})
process.stdin.on('end', () => process.exit(1))
say('Started 1.1')
