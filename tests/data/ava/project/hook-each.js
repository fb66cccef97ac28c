// Failed hooks around single tests, with and without a title of their own.
import test from 'ava';

let count = 0;
test.before('prepare', t => {
	t.log('prepared');
});
test.serial.beforeEach(t => {
	count++;
	if (count === 2) {
		t.fail('second time');
	}
});
test.afterEach.always('cleanup', () => {
	if (count === 3) {
		throw new Error('cannot clean');
	}
});
test.serial('one', t => t.pass());
test.serial('two', t => t.pass());
test.serial('three', t => t.pass());
test.serial('beforeEach hook', t => t.fail());
test.after('never comes', () => {});
