// The status page: one websocket, `status` at each change, and events as they come. What is shown is text, never markup,
// and what others wrote stands in a <bdi>: it cannot turn the direction of what follows.
'use strict'

const MOST = 200 // results and matches that are kept on the page
const BEFORE = 1000 // numbers that are looked at again when the page is opened
const STATUS_MS = 5000 // status is asked for at least so often; at most every CALM_MS
const CALM_MS = 250
const FIRST_RETRY_MS = 500
const MAX_RETRY_MS = 10000
const KINDS = ['Test*', 'Run*', 'SuiteFinished', 'Log*', 'Alert*', 'RoleChanged', 'LinkChanged', 'ReservationChanged',
  'EntitlementChanged', 'SlotsChanged', 'ImportFinished', 'MonitorRun']
const GOOD = new Set(['passed', 'ok', 'running', 'ready', 'ended', 'todo'])
const BAD = new Set(['failed', 'aborted', 'lost', 'blocked', 'backoff', 'offline', 'error', 'critical', 'fatal', 'crashed',
  'timeout', 'protocol_error', 'not_run'])
const FORECAST = { open: 'odd', hit: 'bad', expired: 'soft' }

const $ = selector => document.querySelector(selector)
let socket, last = null, asked = new Map(), number = 0, retry = FIRST_RETRY_MS, status = null, statusAt = 0, timer = null

function node(tag, text, name) {
  const made = document.createElement(tag)
  if (text !== undefined && text !== null) made.textContent = String(text)
  if (name) made.className = name
  return made
}

const tone = word => GOOD.has(word) ? 'good' : BAD.has(word) ? 'bad' : 'odd'

function since(epoch) {
  let seconds = Math.max(0, Math.round(Date.now() / 1000 - epoch))
  const parts = [[86400, 'd'], [3600, 'h'], [60, 'min']].filter(([size]) => seconds >= size)
  if (!parts.length) return `${seconds} s`
  return parts.slice(0, 2).map(([size, unit]) => {
    const whole = Math.floor(seconds / size)
    seconds -= whole * size
    return `${whole} ${unit}`
  }).join(' ')
}

function rows(section, lines) {
  $(`${section} tbody`).replaceChildren(...lines.map(cells => {
    const row = node('tr')
    row.append(...cells.map(cell => cell instanceof Node ? cell : node('td', cell)))
    return row
  }))
}

function age(epoch) {
  const cell = node('td', epoch ? since(epoch) : '')
  if (epoch) cell.dataset.since = epoch
  return cell
}

const state = word => node('td', word, tone(word))

// ---- what is so now

function showStatus() {
  document.body.classList.remove('blank')
  document.title = `${status.ident}${status.runs.length ? ' – running' : ''}`
  $('#ident').textContent = status.ident
  const entitlement = status.entitlement ? `entitlement ${status.entitlement.name}` : null
  const facts = [`version ${status.version}`, `up for ${since(Date.now() / 1000 - status.uptime)}`, status.machine,
    entitlement, status.draining ? 'draining: no new run is taken' : null, status.full ? 'the disk is full' : null]
  $('#machine').textContent = facts.filter(Boolean).join(' · ')
  rows('#runs', status.runs.map(run => [run.run, run.suite, state(run.state), run.test ?? '', age(run.since),
    Object.entries(run.counts).map(([word, count]) => `${count} ${word}`).join(', ')]))
  const peers = [...new Set([...Object.keys(status.links), ...Object.keys(status.outbox)])].sort()
  rows('#links', peers.map(name => {
    const link = status.links[name], box = status.outbox[name]
    return [name, link ? state(link.state) : '', age(link?.since), box?.waiting ?? '', age(box?.oldest), box?.held ?? '',
      link?.error ?? '']
  }))
  rows('#roles', Object.entries(status.roles).map(([name, role]) =>
    [name, state(role.overdue ? 'hangs' : role.state), role.restarts, role.error ?? '']))
  $('#alerts ul').replaceChildren(...status.alerts.map(alert => {
    const item = node('li')
    item.append(node('strong', alert.code), ' ', node('bdi', alert.text), ' ', node('bdi', alert.remedy, 'soft'))
    return item
  }))
  $('#alerts').hidden = !status.alerts.length
}

// Of each group of a tree how many of its own jobs are in which state.
function groups(run, path, below) {
  const states = Object.values(below), count = word => states.filter(state => state === word).length
  const own = states.some(state => typeof state === 'string')
    ? [[run, path.join('/'), count('PENDING'), count('STARTED'), count('COMPLETE')]] : []
  return own.concat(...Object.entries(below).filter(([, inner]) => typeof inner === 'object')
    .map(([name, inner]) => groups(run, [...path, name], inner)))
}

async function showTrees() {
  let runs
  try {
    [runs] = Object.values(await ask('get_tree'))
  } catch { // no such action here
    return
  }
  const live = new Set(status.runs.map(run => run.run))
  const lines = Object.entries(runs).filter(([run]) => live.has(run)).flatMap(([run, below]) => groups(run, [], below))
  rows('#trees', lines.slice(0, MOST))
  $('#trees').hidden = !lines.length
}

const milliseconds = value => value === null ? '' : `${value < 10 ? value.toFixed(1) : Math.round(value)}`

// Of each monitor every step, and how it ended last.
async function showMonitors() {
  let monitors
  try {
    ({ monitors } = await ask('monitors'))
  } catch { // no such action here
    monitors = []
  }
  const lines = monitors.flatMap(monitor => {
    const steps = Object.entries(monitor.steps)
    if (!steps.length) return [[monitor.id, state(monitor.state), '', '', '', '', '']]
    return steps.map(([name, step], n) => [n ? '' : monitor.id, n ? '' : state(monitor.state), name, state(step.last),
      age(step.at), step.ms === null ? '' : `${milliseconds(step.ms)} ms`,
      step.p50 === null ? '' : `${[step.p50, step.p95, step.p99].map(milliseconds).join(' / ')} ms`])
  })
  rows('#monitors', lines.slice(0, MOST))
  $('#monitors').hidden = !lines.length
}

// Sessions of the Drill admin, and whether it has what they saw.
async function showCoverage() {
  let sessions
  try {
    ({ sessions } = await ask('coverage'))
  } catch { // the role is in backoff
    sessions = []
  }
  rows('#coverage', sessions.slice(0, MOST).map(session => [session.session, state(session.state), age(session.since),
    session.test_type, session.test_name ?? '', session.entries, session.waiting ? 'not all yet' : 'all']))
  $('#coverage').hidden = !sessions.length
}

// ---- what happens

function put(section, item) {
  const list = $(`${section} ol`)
  list.prepend(item)
  while (list.children.length > MOST) list.lastChild.remove()
}

function result(event) {
  const { data } = event, item = node('li')
  item.append(node('span', data.state, `word ${tone(data.state)}`), ' ', node('bdi', data.case))
  if (data.duration !== null) item.append(node('span', ` ${Math.round(data.duration * 1000)} ms`, 'soft'))
  item.append(node('span', ` ${event.run}`, 'soft'))
  if (data.message) item.append(node('pre', data.message))
  item.dataset.test = `${event.test}/${data.kind}`
  for (const older of $('#results ol').children) {
    if (older.dataset.test === item.dataset.test) { // a correction
      older.replaceWith(item)
      return
    }
  }
  put('#results', item)
}

function finished(event) {
  const item = node('li')
  item.append(node('span', event.data.verdict, `word ${tone(event.data.verdict)}`), ' ',
    node('bdi', event.data.suite), ' is over ',
    node('span', event.run, 'soft'))
  if (event.data.reason) item.append(node('pre', event.data.reason))
  put('#results', item)
}

function matched(event) {
  const { data } = event, item = node('li'), text = node('pre'), context = data.context ?? {}
  item.dataset.match = data.id
  item.append(node('span', data.severity, `word ${tone(data.severity)}`), ' ', node('bdi', data.rule), ' ',
    node('bdi', `${data.path}${event.test ? ` in ${event.test}` : ''}`, 'soft'))
  for (const anchor of [...(context.anchors ?? [])].reverse()) text.append(node('bdi', anchor.text), '\n') // nearest last
  if (context.elided) text.append(node('span', `… ${context.elided} lines left out`, 'soft'), '\n')
  for (const before of context.before ?? []) text.append(node('bdi', before), '\n')
  text.append(node('bdi', data.text, 'hit'))
  item.append(text)
  put('#logs', item)
}

function completed(event) {
  const { match, after, record } = event.data
  for (const item of $('#logs ol').children) {
    if (item.dataset.match !== match) continue
    const text = item.querySelector('pre')
    for (const line of after) text.append('\n', node('bdi', line))
    if (record.length) text.after(node('pre', record.join('\n'), 'record'))
  }
}

// A failure that is to be expected, and what became of that; the lines that led to it below.
function forecast(event) {
  const { data } = event, item = node('li'), text = node('pre')
  item.dataset.forecast = data.id
  item.append(node('span', data.state, `word ${FORECAST[data.state]}`), ' ', node('bdi', data.class), ' of ', node('bdi', data.key),
    node('span', ` ${Math.round(data.probability * 100)} % within ${Math.round(data.horizon_s)} s`, 'soft'))
  for (const line of data.evidence) text.append(node('bdi', line.text), '\n')
  item.append(text)
  const older = [...$('#forecasts ol').children].find(({ dataset }) => dataset.forecast === data.id)
  if (older) older.replaceWith(item)
  else put('#forecasts', item)
}

// How good forecasts have been.
async function showForecasts() {
  let numbers
  try {
    numbers = await ask('metrics')
  } catch { // this token may not
    numbers = {}
  }
  const count = name => numbers[`logs_forecast${name}`] ?? 0
  const hits = count('s_total{state="hit"}'), expired = count('s_total{state="expired"}'), missed = count('s_missed_total')
  const share = (part, whole) => whole ? ` (${Math.round(100 * part / whole)} %)` : ''
  $('#forecasts p').textContent = `${count('s_open')} open. ${hits} of ${hits + expired} came true${share(hits, hits + expired)}, ` +
    `${hits} of ${hits + missed} failures were forecast${share(hits, hits + missed)}.`
  $('#forecasts').hidden = !(hits + expired + missed + count('s_open')) && !$('#forecasts ol').children.length
}

// What the machine is, in one line.
function machine({ facts, profile }) {
  const joined = (...names) => names.map(name => facts[name]).filter(Boolean).join(' ')
  return [joined('dmi.sys_vendor', 'dmi.product_name') || joined('dt.model'), joined('os.id', 'os.version', 'arch'),
    joined('cpu.model') && `${facts['cpu.model']} (${facts['cpu.cores']} cores)`, profile && `profile ${profile}`]
    .filter(Boolean).join(', ')
}

const SHOWN = { TestFinished: result, SuiteFinished: finished, LogMatched: matched, LogContext: completed,
  LogForecast: forecast }

function take(events) {
  for (const event of events) {
    if (event.kind === 'Gap') {
      last = Math.max(last ?? 0, event.data.to)
    } else if (event.seq > (last ?? 0)) {
      last = event.seq
      SHOWN[event.kind]?.(event)
    }
  }
  look()
}

// ---- the websocket

function ask(action, payload = {}) {
  return new Promise((resolve, reject) => {
    asked.set(number, { resolve, reject })
    socket.send(JSON.stringify({ action, req_id: number++, payload }))
  })
}

async function look() { // status now, or soon when it was asked for a moment ago
  clearTimeout(timer)
  const wait = statusAt + CALM_MS - Date.now()
  if (wait > 0) {
    timer = setTimeout(look, wait)
    return
  }
  statusAt = Date.now()
  timer = setTimeout(look, STATUS_MS)
  try {
    status = { ...await ask('status'), machine: status?.machine }
    showStatus()
    await showTrees()
    await showMonitors()
    await showCoverage()
    await showForecasts()
  } catch (error) {
    say(error.message)
  }
}

const say = text => { if ($('#connection').textContent !== text) $('#connection').textContent = text }

async function begin() {
  const token = sessionStorage.getItem('token')
  try {
    if (token) await ask('auth', { token })
    status = await ask('status')
  } catch (error) {
    if (socket.readyState !== WebSocket.OPEN) return // no refusal: it is connected again, with the same token
    sessionStorage.removeItem('token')
    $('#refused').textContent = token ? error.message : ''
    $('#login').hidden = false
    say('A token is needed.')
    if (document.activeElement === document.body) $('#token').focus()
    return
  }
  $('#login').hidden = true
  showStatus()
  try {
    status.machine = machine(await ask('profile'))
  } catch { // no such action here
    status.machine = null
  }
  const from = last === null || last > status.seq ? Math.max(0, status.seq - BEFORE) : last
  last = from
  try {
    await ask('subscribe', { kinds: KINDS, since: from })
    say('live')
    retry = FIRST_RETRY_MS
  } catch (error) {
    say(error.message)
  }
  look()
}

function connect() {
  socket = new WebSocket(`${location.protocol === 'https:' ? 'wss' : 'ws'}://${location.host}/`)
  asked = new Map()
  socket.onopen = begin
  socket.onmessage = ({ data }) => {
    const message = JSON.parse(data)
    if (message.action === 'events' && message.posted) {
      take(message.payload.events)
      return
    }
    const waiting = asked.get(message.rsp_id)
    asked.delete(message.rsp_id)
    if (message.result === 'success') waiting?.resolve(message.payload)
    else waiting?.reject(new Error(message.reason))
  }
  socket.onclose = () => {
    clearTimeout(timer)
    for (const { reject } of asked.values()) reject(new Error('the connection is closed'))
    if (!$('#login').hidden) return // connected again when a token is given
    say(`Not connected; what is shown was so at ${new Date().toLocaleTimeString()}.`)
    setTimeout(connect, retry * (0.5 + Math.random() / 2))
    retry = Math.min(2 * retry, MAX_RETRY_MS)
  }
}

$('#login').addEventListener('submit', submitted => {
  submitted.preventDefault()
  sessionStorage.setItem('token', $('#token').value.trim())
  $('#token').value = ''
  $('#login').hidden = true
  say('connecting')
  if (socket.readyState === WebSocket.OPEN) begin()
  else connect()
})

setInterval(() => {
  for (const cell of document.querySelectorAll('[data-since]')) cell.textContent = since(Number(cell.dataset.since))
}, 1000)

connect()
