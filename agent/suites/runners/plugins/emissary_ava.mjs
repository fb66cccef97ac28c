// AVA's configuration for the driver `events`: the project's own, and an observer that writes what happens, one JSON
// object a line, to the pipe of the agent. Loaded with --config, from outside the project.
//
// Source: protocols/suites.md, "AVA, driver events".

import fs from 'node:fs';
import path from 'node:path';
import process from 'node:process';
import {pathToFileURL} from 'node:url';

const PIPE = Number(process.env.EMISSARY_PIPE_EVENTS);
const OWN_CONFIG = process.env.EMISSARY_AVA_CONFIG;
// Not for the tests, whose environment is a copy of this one.
delete process.env.EMISSARY_PIPE_EVENTS;
delete process.env.EMISSARY_AVA_CONFIG;
// Bytes of a line: the agent reads no longer one.
const LINE_MAX = 1_048_576;
// Bytes of output that one line tells.
const CHUNK_MAX = 65_536;
// UTF-16 units of a title. Each event of a test tells the same of it.
const TITLE_MAX = 65_536;
// UTF-16 units of one text, and of a log. The agent keeps half of it, and marks what it cut.
const TEXT_MAX = 131_072;

const isObject = value => typeof value === 'object' && value !== null && !Array.isArray(value);
// Half of a surrogate pair, of the test's own or by our cut, is no text for the agent.
const text = (value, most) => String(value ?? '').slice(0, most).replace(/\p{Surrogate}/gu, '\uFFFD');

const encode = told => Buffer.from(JSON.stringify(told) + '\n');

function write(rest) {
	while (rest.length > 0) {
		try {
			rest = rest.subarray(fs.writeSync(PIPE, rest));
		} catch (error) {
			if (error.code !== 'EAGAIN') {
				return; // Nobody reads any more; the results still go out as TAP.
			}

			Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 5); // The pipe is full: 5 ms.
		}
	}
}

// Where AVA itself would look: the nearest package.json, then ava.config.* from its folder up to the repository's root.
function nearestPackage() {
	for (let folder = process.cwd(); ; folder = path.dirname(folder)) {
		const file = path.join(folder, 'package.json');
		if (fs.existsSync(file)) {
			return file;
		}

		if (folder === path.dirname(folder)) {
			return undefined;
		}
	}
}

async function load(file, projectDir) {
	const {default: found} = await import(pathToFileURL(file));
	const config = typeof found === 'function' ? await found({projectDir}) : found;
	if (!isObject(config)) {
		throw new TypeError(`${file} must export a plain object, or a function that returns one`);
	}

	return config;
}

async function projectConfig() {
	const packageFile = nearestPackage();
	const projectDir = packageFile === undefined ? process.cwd() : path.dirname(packageFile);
	if (OWN_CONFIG !== undefined) {
		const file = path.resolve(OWN_CONFIG);
		return fs.existsSync(file) ? load(file, projectDir) : {};
	}

	const inPackage = packageFile === undefined ? {} : JSON.parse(fs.readFileSync(packageFile, 'utf8')).ava ?? {};
	for (let folder = projectDir; ; folder = path.dirname(folder)) {
		const found = ['js', 'cjs', 'mjs'].map(ending => path.join(folder, `ava.config.${ending}`)).filter(file => fs.existsSync(file));
		if (found.length > 1) {
			throw new Error(`Conflicting configuration in ${found.join(' and ')}`);
		}

		if (found.length === 1) {
			if (Object.keys(inPackage).length > 0) {
				throw new Error(`Conflicting configuration in ${found[0]} and package.json`);
			}

			return load(found[0], projectDir);
		}

		if (fs.existsSync(path.join(folder, '.git')) || folder === path.dirname(folder)) {
			return inPackage;
		}
	}
}

const relative = file => file === undefined ? undefined : path.relative(process.cwd(), file);

// The parts of a stack's line that name a place: AVA tells a file: URL and a line.
function place({source}) {
	if (!source?.file) {
		return undefined;
	}

	const file = source.file.startsWith('file:') ? decodeURIComponent(new URL(source.file).pathname) : source.file;
	return `${relative(file)}:${source.line}`;
}

function describe(err, most) {
	if (!err) {
		return undefined;
	}

	if (err.type === 'unknown') {
		return {message: 'Non-native error', formatted: text(err.formattedError, most)};
	}

	const details = {};
	for (const {label, formatted} of err.formattedDetails ?? []) {
		details[text(label, most)] = text(formatted, most);
	}

	return {
		name: text(err.name, most),
		code: err.originalError?.code,
		assertion: err.assertion,
		details: Object.keys(details).length > 0 ? details : undefined,
		message: text(err.message, most),
		at: place(err),
		line: text(err.stack?.split('\n')[0].trim() ?? err.message, most),
	};
}

function pending(tests) {
	return tests && Object.fromEntries([...tests].map(([file, titles]) => [relative(file), [...titles].map(title => text(title, TITLE_MAX))]));
}

// The first of them, as far as there is room.
function bounded(logs, most) {
	const kept = [];
	for (const log of logs) {
		if (most <= 0) {
			break;
		}

		kept.push(text(log, most));
		most -= log.length + 1;
	}

	return kept;
}

function translate(event, most) {
	const {type, testFile} = event;
	switch (type) {
		case 'stats':
		case 'touched-files':
		case 'accessed-snapshots':
		case 'test-timeout-configured': {
			return undefined;
		}

		default: {
			return {
				type,
				testFile: relative(testFile),
				title: event.title === undefined ? undefined : text(event.title, TITLE_MAX),
				skip: event.skip,
				todo: event.todo,
				knownFailing: event.knownFailing,
				duration: event.duration,
				// That of a start is the log to come.
				logs: type !== 'test-register-log-reference' && event.logs?.length > 0 ? bounded(event.logs, most) : undefined,
				err: describe(event.err, most),
				nonZeroExitCode: event.nonZeroExitCode,
				signal: event.signal ?? undefined,
				forcedExit: event.forcedExit,
				period: event.period,
				pendingTests: type === 'timeout' ? pending(event.pendingTests) : undefined,
			};
		}
	}
}

function tell(event) {
	for (let most = TEXT_MAX; ; most = Math.floor(most / 2)) {
		const told = translate(event, most);
		const line = told && encode(told);
		if (!line || line.length <= LINE_MAX || most === 0) {
			return line && write(line);
		}
	}
}

function tellOutput({type, testFile, chunk}) {
	const bytes = Buffer.from(chunk);
	for (let at = 0; at < bytes.length; at += CHUNK_MAX) {
		write(encode({type, testFile: relative(testFile), chunk: bytes.toString('base64', at, at + CHUNK_MAX)}));
	}
}

async function observeRun({events}) {
	let total;
	for await (const event of events) {
		if (total === undefined && event.type === 'stats') {
			total = event.stats.files;
			write(encode({type: 'files', total}));
		}

		if (event.chunk === undefined) {
			tell(event);
		} else {
			tellOutput(event);
		}
	}
}

const config = await projectConfig();
if (config.observeRun) {
	write(encode({type: 'unusable', reason: 'the project has an observeRun of its own'}));
}

export default config.observeRun ? config : {
	...config,
	nonSemVerExperiments: {...config.nonSemVerExperiments, observeRunsFromConfig: true},
	observeRun,
};
