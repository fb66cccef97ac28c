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
// UTF-16 units of one text. The agent cuts to the same order of size; this keeps a line within its limit.
const TEXT_MAX = 65_536;
const LOGS_MAX = 1000;

const isObject = value => typeof value === 'object' && value !== null && !Array.isArray(value);
const text = value => String(value ?? '').slice(0, TEXT_MAX);

function write(event) {
	let rest = Buffer.from(JSON.stringify(event) + '\n');
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

function describe(err) {
	if (!err) {
		return undefined;
	}

	if (err.type === 'unknown') {
		return {message: 'Non-native error', formatted: text(err.formattedError)};
	}

	const details = {};
	for (const {label, formatted} of err.formattedDetails ?? []) {
		details[text(label)] = text(formatted);
	}

	return {
		name: text(err.name),
		code: err.originalError?.code,
		assertion: err.assertion,
		details: Object.keys(details).length > 0 ? details : undefined,
		message: text(err.message),
		at: place(err),
		line: text(err.stack?.split('\n')[0].trim() ?? err.message),
	};
}

function pending(tests) {
	return tests && Object.fromEntries([...tests].map(([file, titles]) => [relative(file), [...titles].map(text)]));
}

function translate(event) {
	const {type, testFile} = event;
	switch (type) {
		case 'worker-stdout':
		case 'worker-stderr': {
			return {type, testFile: relative(testFile), chunk: Buffer.from(event.chunk).toString('base64')};
		}

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
				title: event.title === undefined ? undefined : text(event.title),
				skip: event.skip,
				todo: event.todo,
				knownFailing: event.knownFailing,
				duration: event.duration,
				logs: event.logs?.length > 0 ? event.logs.slice(0, LOGS_MAX).map(text) : undefined,
				err: describe(event.err),
				nonZeroExitCode: event.nonZeroExitCode,
				signal: event.signal ?? undefined,
				forcedExit: event.forcedExit,
				period: event.period,
				pendingTests: pending(event.pendingTests),
			};
		}
	}
}

async function observeRun({events}) {
	let total;
	for await (const event of events) {
		if (total === undefined && event.type === 'stats') {
			total = event.stats.files;
			write({type: 'files', total});
		}

		const told = translate(event);
		if (told) {
			write(told);
		}
	}
}

const config = await projectConfig();
if (config.observeRun) {
	write({type: 'unusable', reason: 'the project has an observeRun of its own'});
}

export default config.observeRun ? config : {
	...config,
	nonSemVerExperiments: {...config.nonSemVerExperiments, observeRunsFromConfig: true},
	observeRun,
};
