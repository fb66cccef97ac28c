// Titles that look like directives, like crashes, like hooks; odd characters.
import test from 'ava';

test.skip('a real skip', t => t.pass());
test.skip('a skip # SKIP', t => t.pass());
test.todo('a real todo');
test.todo('a todo # TODO');
test('passes # SKIP', t => t.pass());
test('passes # SKIP because', t => t.pass());
test('passes # TODO', t => t.pass());
test('fails # TODO', t => t.fail());
test('fails # SKIP', t => t.fail());
test('logs # SKIP', t => {
	t.log('a skip says nothing');
	t.pass();
});
test('  white \t space\n everywhere ', t => t.pass());
test('back\\slash \\# and # hash', t => t.pass());
test('\u001B[31mred\u001B[39m', t => t.pass());
test('žluťoučký kůň 🐎 漢字', t => t.pass());
test('a › b', t => t.pass());
test('1..5', t => t.pass());
test('titles.js exited with a non-zero exit code: 1', t => t.fail());
test('titles.js exited due to SIGKILL', t => t.pass());
test('No tests found in titles.js', t => t.fail());
test('TypeError: thrown', () => {
	throw new TypeError('thrown');
});
test('uncaught-exception', t => t.fail());
test('before hook', t => t.fail());
test('beforeEach hook for nothing', t => t.fail());
test('hunting for before hook', t => t.fail());
test('x'.repeat(3000), t => t.pass());
