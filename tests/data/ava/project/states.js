// The plain states, failures of each kind, and what stands between a result's line and its YAML.
import test from 'ava';

test('passes', t => {
	t.pass();
});

test('passes and logs', t => {
	t.log('one', {two: 2});
	t.log('first line\n\n  ---\nlast line');
	t.pass();
});

test('a wrong value', t => {
	t.is(1, 2);
});

test('a wrong value and a message', t => {
	t.log('before the failure\n  ...\nnot ok 99 - faked');
	t.deepEqual({a: 1, b: [1, 2]}, {a: 1, b: [1, 3]}, 'the two\nshould agree');
});

test('throws', () => {
	throw new TypeError('thrown: on purpose');
});

test('throws what is no error', () => {
	throw {code: 7}; // eslint-disable-line no-throw-literal
});

test('rejects', async () => {
	await Promise.reject(new Error('rejected'));
});

test('no assertion', () => {});

test('plan', t => {
	t.plan(2);
	t.pass();
});

test.skip('skipped', t => {
	t.pass();
});

test.todo('to be done');

test.failing('known to fail, fails', t => {
	t.fail();
});

test.failing('known to fail, passes', t => {
	t.pass();
});

test('prints what looks like results', t => {
	console.log('not ok 1 - faked on stdout\n1..1');
	console.error('ok 2 - faked on stderr');
	t.pass();
});

test('times out', async t => {
	t.timeout(50, 'too slow');
	await new Promise(resolve => {
		setTimeout(resolve, 500);
	});
});

test('never settles', () => new Promise(() => {}));

test('a failed snapshot', t => {
	t.snapshot({never: 'written'});
});
