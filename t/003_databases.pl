# Several databases with several buffers each, all busy at once; and what
# becomes of a database's workers and counts when it is dropped, renamed or
# copied.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $node = new_node('databases',
	q{shared_preload_libraries = 'statbuffer'},
	'statbuffer.max_workers = 6');

sub new_database
{
	my ($db, @buffers) = @_;

	$node->safe_psql('postgres', "CREATE DATABASE $db");
	$node->safe_psql($db, 'CREATE EXTENSION statbuffer');
	make_buffer($node, $db, $_->[0], $_->[1]) for @buffers;
}

# --- all busy at once -------------------------------------------------------

# Buffers of the same names everywhere: they must not be mixed up.
my @databases = qw(red green blue);
my @buffers = qw(hits misses errors);
for my $db (@databases)
{
	new_database($db, map { [ $_, q{interval '20ms', timeout '200ms'} ] } @buffers);
	$node->safe_psql($db, q{
		CREATE PROCEDURE count_much(buffer regclass, factor int) LANGUAGE plpgsql AS $$
		BEGIN
			FOR i IN 1 .. 500 LOOP
				PERFORM sb_increment('k' || i % 7, factor, buffer);
				IF i % 5 = 0 THEN
					ROLLBACK;
				ELSE
					COMMIT;
				END IF;
				PERFORM pg_sleep(0.001);
			END LOOP;
		END
		$$;
	});
}

# One of five increments is rolled back; each buffer counts by another number.
my @clients;
my %factor;
for my $db (@databases)
{
	for my $buffer (@buffers)
	{
		$factor{"$db.$buffer"} = 1 + keys %factor;
		push @clients,
		  start_session($node, $db, "CALL count_much('$buffer', $factor{\"$db.$buffer\"})");
	}
}
for my $client (@clients)
{
	is(finish_session($client, 'a client has done its work'), '', 'without a word');
}
for my $db (@databases)
{
	for my $buffer (@buffers)
	{
		is($node->safe_psql($db, "SELECT sb_drain('$buffer')"), 't', "$db.$buffer: drained");
		is(stored($node, $db, $buffer), 400 * $factor{"$db.$buffer"}, "$db.$buffer: what was committed is stored");
	}
}
wait_for_no_worker($node, 'all workers have left');

# --- DROP DATABASE ----------------------------------------------------------

# A worker sleeps there, and counts are pending; the session that drops it has
# nothing to do with the extension.
my $offset = -s $node->logfile;
new_database('doomed', [ 'hits', q{interval '1h', timeout '1h'} ]);
increment($node, 'doomed', 'hits', 'a');
is($node->safe_psql('doomed', q{SELECT sb_drain('hits')}), 't', 'a worker is there');
increment($node, 'doomed', 'hits', 'a', 40);
increment($node, 'doomed', 'hits', 'b', 2);
is($node->safe_psql('doomed', 'SELECT count(pid), sum(pending) FROM sb_stat_buffers'), '1|42',
	'a worker sleeps, counts are pending');
$node->safe_psql('postgres', 'DROP DATABASE doomed');
pass('DROP DATABASE: the worker made room');
$node->wait_for_log(qr/dropped the counts of a database that no longer exists.*\n.* held counts of 42 altogether in 2 keys\./, $offset);
pass('DROP DATABASE: its counts are freed, and the log tells');

# The same with counts whose worker has left.
$offset = -s $node->logfile;
new_database('doomed', [ 'hits', q{interval '1h', timeout '100ms'} ]);
increment($node, 'doomed', 'hits', 'a', 42);
wait_for_no_worker($node, 'no worker is there');
$node->safe_psql('postgres', 'DROP DATABASE doomed');
$node->wait_for_log(qr/dropped the counts of a database that no longer exists.*\n.* held a count of 42 in 1 key\./, $offset);
pass('DROP DATABASE without a worker: its counts are freed, too');

# With FORCE.
$offset = -s $node->logfile;
new_database('doomed', [ 'hits', q{interval '1h', timeout '1h'} ]);
increment($node, 'doomed', 'hits', 'a', 42);
$node->safe_psql('postgres', 'DROP DATABASE doomed WITH (FORCE)');
$node->wait_for_log(qr/dropped the counts of a database that no longer exists.*\n.* held a count of 42 in 1 key\./, $offset);
pass('DROP DATABASE WITH (FORCE)');

# What cannot be dropped goes on as before.
increment($node, 'red', 'hits', 'a', 1000);
my ($result, $stdout, $stderr) = $node->psql('red', 'DROP DATABASE red');
like($stderr, qr/cannot drop the currently open database/, 'DROP DATABASE of the own one fails');
wait_for_stored($node, 'red', 'hits', 1000 + 400 * $factor{'red.hits'}, 'and its buffers work');

my $guest = $node->background_psql('red');
$guest->query_safe('SELECT 1');
increment($node, 'red', 'hits', 'a', 1000);
($result, $stdout, $stderr) = $node->psql('postgres', 'DROP DATABASE red');
like($stderr, qr/is being accessed by other users/, 'DROP DATABASE of one in use fails');
increment($node, 'red', 'hits', 'a', 1000);
wait_for_stored($node, 'red', 'hits', 3000 + 400 * $factor{'red.hits'}, 'and its buffers work');
$guest->quit;

# Who may not drop it, does not disturb.
$node->safe_psql('postgres', 'CREATE ROLE nobody LOGIN');
make_buffer($node, 'red', 'resting', q{interval '1h', timeout '1h'});
increment($node, 'red', 'resting', 'a');
is($node->safe_psql('red', q{SELECT sb_drain('resting')}), 't', 'a worker rests');
my $pid = $node->safe_psql('red', q{SELECT pid FROM sb_stat_buffers WHERE buffer = 'resting'});
($result, $stdout, $stderr) = $node->psql('postgres', 'DROP DATABASE red',
	extra_params => [ '-U', 'nobody' ]);
like($stderr, qr/must be owner of database/, 'DROP DATABASE by a stranger fails');
is($node->safe_psql('red', q{SELECT pid FROM sb_stat_buffers WHERE buffer = 'resting'}), $pid,
	'and its worker stays');

# --- RENAME and TEMPLATE ----------------------------------------------------

increment($node, 'red', 'resting', 'a', 5);
$node->safe_psql('postgres', 'ALTER DATABASE red RENAME TO crimson');
is($node->safe_psql('crimson', q{SELECT sb_count('a', 'resting')}), '5', 'RENAME: counts are kept');
is($node->safe_psql('crimson', q{SELECT sb_drain('resting')}), 't', 'RENAME: and flushed');
is(stored($node, 'crimson', 'resting'), '6', 'RENAME: to the last one');

increment($node, 'crimson', 'resting', 'a', 5);
$node->safe_psql('postgres', 'CREATE DATABASE copy TEMPLATE crimson');
is($node->safe_psql('copy', q{SELECT sb_count('a', 'resting') IS NULL}), 't', 'TEMPLATE: the copy has no counts');
increment($node, 'copy', 'resting', 'a', 70);
is($node->safe_psql('copy', q{SELECT sb_drain('resting')}), 't', 'TEMPLATE: the copy counts');
is($node->safe_psql('crimson', q{SELECT sb_drain('resting')}), 't', 'TEMPLATE: so does the original');
is(stored($node, 'copy', 'resting'), '76', 'TEMPLATE: the copy, to the last one');
is(stored($node, 'crimson', 'resting'), '11', 'TEMPLATE: the original, to the last one');

# --- several statements at once ---------------------------------------------

# has_no_worker(DATABASE, WHAT): waits for that.
sub has_no_worker
{
	my ($database, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for($node, 'postgres',
		"SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'statbuffer worker' AND datname = '$database'", $what);
	return;
}

# copy_slowly(DATABASE): a session that copies it, and waits for a lock.
sub copy_slowly
{
	my ($database) = @_;
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	my $pid = $session->query_safe('SELECT pg_backend_pid()');

	$session->query_until(qr/copying/, "\\echo copying\nCREATE DATABASE copy_$pid TEMPLATE $database;\n");
	wait_for($node, 'postgres', "SELECT count(*) = 1 FROM pg_locks WHERE pid = $pid AND NOT granted",
		"$database: a session waits to copy it");
	return [ $session, $pid ];
}

# end_copying(SESSION, FUNCTION): by pg_cancel_backend() or pg_terminate_backend().
sub end_copying
{
	my ($copying, $function) = @_;
	my ($session, $pid) = @$copying;

	$node->safe_psql('postgres', "SELECT $function($pid)");
	wait_for($node, 'postgres', "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $pid AND state = 'active'",
		"$function(): it gives up");
	return;
}

# Sessions that are in these databases before others want to copy them: who
# comes later waits for the same lock.
my %inside;

# stay_out(WHAT, DATABASE...): the counts there have no worker, though the
# launcher has looked for work since.
sub stay_out
{
	my ($what, @databases) = @_;
	my $before = stored($node, 'blue', 'hits');

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	has_no_worker('blue', "$what: elsewhere, there is no worker");
	increment($node, 'blue', 'hits', 'a');
	wait_for_stored($node, 'blue', 'hits', $before + 1, "$what: one comes, and stores what is counted");
	is($inside{$_}->query_safe('SELECT pending, pid IS NULL FROM sb_stat_buffers'), '5|t', "$what: not in $_")
	  for @databases;
	return;
}

# Two sessions copy a database, and one gives up: the other one still has it to
# itself.
my @templates = map { "template_$_" } 1 .. 9;
new_database($_, [ 'quick', q{interval '20ms', timeout '200ms'} ]) for @templates;
$inside{$_} = $node->background_psql($_) for @templates;
my $locker = $node->background_psql('postgres');
$locker->query_safe(join ';', 'BEGIN', map { "COMMENT ON DATABASE $_ IS 'locked'" } @templates);
my @copying = (copy_slowly('template_1'), copy_slowly('template_1'));
$inside{template_1}->query_safe(q{SELECT sb_increment('a', 5, 'quick')});
stay_out('two copies', 'template_1');
end_copying(shift @copying, 'pg_cancel_backend');
stay_out('one copy', 'template_1');

# More databases than can be noted: the one that came first has lost its place,
# and does not take another one's with it when it is done.
push @copying, map { copy_slowly($_) } @templates[1 .. 8];
$inside{$_}->query_safe(q{SELECT sb_increment('a', 5, 'quick')}) for @templates[1 .. 8];
$inside{template_1}->query_safe(q{
	DO $$
	BEGIN
		WHILE EXISTS (SELECT FROM sb_stat_buffers WHERE pid IS NULL) LOOP
			PERFORM pg_sleep(0.01);
		END LOOP;
	END $$});
pass('nine copies: there is no place for the first one');
end_copying(shift @copying, 'pg_cancel_backend');
stay_out('eight copies', @templates[1 .. 8]);

# A session that is terminated does not keep the workers out.
end_copying(shift @copying, 'pg_terminate_backend');
is($inside{$_}->query_safe(q{SELECT sb_drain('quick')}), 't', "$_: a worker is let in again") for @templates[0 .. 1];
stay_out('seven copies', @templates[2 .. 8]);

# The others come to their end.
$_->quit for values %inside;
$locker->query_safe('COMMIT');
$locker->quit;
for my $copying (@copying)
{
	wait_for($node, 'postgres', "SELECT count(*) = 1 FROM pg_database WHERE datname = 'copy_$copying->[1]'", 'a copy is made');
	$copying->[0]->quit;
}
wait_for_stored($node, $_, 'quick', 5, "$_: everything is stored") for @templates;

# The others never noticed.
increment($node, $_, 'hits', 'a', 1000) for qw(green blue);
wait_for_stored($node, 'green', 'hits', 1000 + 400 * $factor{'green.hits'}, 'green is as it was');
wait_for_stored($node, 'blue', 'hits', 1004 + 400 * $factor{'blue.hits'}, 'blue is, too, but for what was counted there');
$node->stop;

# --- not preloaded ----------------------------------------------------------

# There is nothing that could ask the worker to leave, in a session that has
# not used the extension: FORCE ends it.
$node->adjust_conf('postgresql.conf', 'shared_preload_libraries', q{''});
$node->start;
$offset = -s $node->logfile;
new_database('doomed', [ 'hits', q{interval '10s', timeout '1h'} ]);
increment($node, 'doomed', 'hits', 'a');
is($node->safe_psql('doomed', q{SELECT sb_drain('hits')}), 't', 'not preloaded: a worker is there');
increment($node, 'doomed', 'hits', 'a', 42);
$node->safe_psql('postgres', 'DROP DATABASE doomed WITH (FORCE)');
$node->wait_for_log(qr/dropped the counts of a database that no longer exists.*\n.* held a count of 42 in 1 key\./, $offset);
pass('not preloaded: DROP DATABASE WITH (FORCE) works, and its counts are freed');

# But a worker comes late and does not stay, whatever the buffer says, so that
# PostgreSQL's own five seconds of patience suffice.
new_database('doomed', [ 'hits', q{interval '5s', timeout '1h'} ]);
increment($node, 'doomed', 'hits', 'a');
is($node->safe_psql('doomed', q{SELECT sb_drain('hits')}), 't', 'not preloaded: a worker is there once more');
$node->command_ok([ 'createdb', '-T', 'doomed', 'copied' ], 'not preloaded: createdb -T works after a flush');
increment($node, 'doomed', 'hits', 'a');
$node->command_ok([ 'dropdb', 'doomed' ], 'not preloaded: dropdb works after a count');
$node->safe_psql('postgres', 'DROP DATABASE copied');

# From 19 on the server terminates workers that are in the way.
SKIP:
{
	skip 'in this version nobody else ends the worker', 7
	  if major($node) < 19;

	my $directory = $node->basedir . '/space';

	mkdir $directory or die $!;
	$node->safe_psql('postgres', "CREATE TABLESPACE space LOCATION '$directory'");
	new_database('strange', [ 'hits', q{interval '10s', timeout '1h'} ]);
	my $sum = 0;
	for my $statement (
		'ALTER DATABASE strange RENAME TO stranger',
		'CREATE DATABASE double TEMPLATE stranger',
		'ALTER DATABASE stranger SET TABLESPACE space')
	{
		my $database = $sum == 0 ? 'strange' : 'stranger';
		increment($node, $database, 'hits', 'a');
		is($node->safe_psql($database, q{SELECT sb_drain('hits')}), 't', "not preloaded: a worker is there, before $statement");
		increment($node, $database, 'hits', 'a', 10);
		$node->safe_psql('postgres', $statement);
		$sum += 11;
		$node->safe_psql('stranger', q{SELECT sb_drain('hits')});
		is(stored($node, 'stranger', 'hits'), $sum, "not preloaded: $statement loses nothing");
	}

	$offset = -s $node->logfile;
	increment($node, 'stranger', 'hits', 'a', 42);
	$node->safe_psql('postgres', "DROP DATABASE $_") for qw(stranger double);
	$node->wait_for_log(qr/dropped the counts of a database that no longer exists.*\n.* held a count of 42 in 1 key\./, $offset);
	pass('not preloaded: DROP DATABASE works, and its counts are freed');
	$node->safe_psql('postgres', 'DROP TABLESPACE space');
}

# One that has used it asks, too.
new_database('doomed', [ 'hits', q{interval '1h', timeout '1h'} ]);
increment($node, 'doomed', 'hits', 'a');
is($node->safe_psql('doomed', q{SELECT sb_drain('hits')}), 't', 'not preloaded: a worker is there again');
my $session = $node->background_psql('green');
$session->query_safe(q{SELECT sb_increment('a', 1, 'hits')});
$session->query_safe('DROP DATABASE doomed');
$session->quit;
pass('not preloaded: DROP DATABASE in a session that has used the extension works');
wait_for_stored($node, 'green', 'hits', 1001 + 400 * $factor{'green.hits'}, 'and other databases go on');

$node->stop;
done_testing();
