import test from 'ava';
import {PasswordStore} from '../store.js';

test.beforeEach(t => {
	t.context.store = new PasswordStore();
	t.context.store.set('ann', 'correct horse');
});

test('accepts the right password', t => {
	t.true(t.context.store.check('ann', 'correct horse'));
});

test('refuses a wrong password', t => {
	t.false(t.context.store.check('ann', 'battery staple'));
});

test('refuses an unknown user', t => {
	t.log('nobody is called bob');
	t.false(t.context.store.check('bob', 'correct horse'));
});

test.failing('locks the account after three wrong passwords', t => {
	for (const guess of ['one', 'two', 'three']) {
		t.context.store.check('ann', guess);
	}

	t.false(t.context.store.check('ann', 'correct horse'));
});
