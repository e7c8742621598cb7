# Databases are dropped, renamed, copied and moved to another tablespace while a
# handler there is in the middle of a call: who waits for it, how long, and what
# becomes of the counts.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use DdlTest;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

# --- databases --------------------------------------------------------------

# A database with a handler that is in the middle of a call as long as there is
# a file: an advisory lock would need a session there.
sub make_busy_database
{
	my ($name, $file) = @_;

	append_to_file($file, 'shut') if !-e $file;
	$node->safe_psql('postgres', "CREATE DATABASE $name");
	$node->safe_psql($name, qq{
		CREATE EXTENSION statbuffer;
		CREATE TABLE hits_calls (key text, counter bigint);
		CREATE FUNCTION hits_store(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS \$\$
		BEGIN
			INSERT INTO hits_calls VALUES (key, counter);
			WHILE EXISTS (SELECT FROM pg_stat_file('$file', true) WHERE size IS NOT NULL) LOOP
				PERFORM pg_sleep(0.01);
			END LOOP;
		END
		\$\$;
		CREATE FOREIGN TABLE hits (key text NOT NULL, count bigint NOT NULL)
		SERVER statbuffer OPTIONS (handler 'hits_store', interval '20ms', timeout '1h')});
	increment($node, $name, 'hits', 'k', 5);
	wait_for($node, $name, q{SELECT in_flight = 5 FROM sb_stat_buffers}, "$how, database $name: a handler is in the middle of a call");
	increment($node, $name, 'hits', 'k', 2);
	increment($node, $name, 'hits', 'other', 100);
	return;
}

sub test_databases
{
	my $file = $node->basedir . '/shut';
	my $dropped = qr/dropped the counts of a database that no longer exists.*\n.* held counts of/;
	my $offset;

	make_busy_database('patient', $file);

	# Handlers elsewhere are nobody else's business.
	$node->safe_psql('postgres', 'CREATE DATABASE innocent');
	$node->safe_psql('postgres', 'DROP DATABASE innocent');
	pass("$how: DROP DATABASE of another one does not wait for a handler");
	is($node->safe_psql('patient', 'SELECT in_flight FROM sb_stat_buffers'), '5', "$how: which is still at work");

	if (!$preloaded && major($node) >= 19)
	{
		# Nobody asks the worker to leave, but the server terminates it: what
		# its handler was given is given back.
		$node->safe_psql('postgres', 'ALTER DATABASE patient RENAME TO impatient');
		is($node->safe_psql('impatient', 'SELECT count(*) FROM hits_calls'), '0', "$how, RENAME: what the handler did is undone");
		$node->safe_psql('postgres', 'ALTER DATABASE impatient RENAME TO patient');
		wait_for($node, 'patient', q{SELECT in_flight > 0 AND in_flight + pending = 107 FROM sb_stat_buffers},
			"$how, RENAME: another worker goes on, with all of it");
		unlink $file or die $!;
		wait_for_stored($node, 'patient', 'hits', 107, "$how, RENAME: and stores it");

		# With the database everything goes.
		$offset = -s $node->logfile;
		append_to_file($file, 'shut');
		make_busy_database('doomed', $file);
		$node->safe_psql('postgres', 'DROP DATABASE doomed');
		$node->wait_for_log(qr/$dropped 107 altogether in 2 keys/, $offset);
		pass("$how, DROP DATABASE: the log tells what was dropped");

		increment($node, 'patient', 'hits', 'k', 5);
		wait_for($node, 'patient', q{SELECT in_flight = 5 FROM sb_stat_buffers}, "$how: the handler is in the middle of a call");
		increment($node, 'patient', 'hits', 'k', 2);
		increment($node, 'patient', 'hits', 'other', 100);
	}
	elsif (!$preloaded)
	{
		# Nobody asks the worker to leave.
		for my $statement ('DROP DATABASE patient', 'ALTER DATABASE patient RENAME TO impatient')
		{
			like(error_of($statement, $how), qr/is being accessed by other users/, "$how: there is a worker");
		}
		is($node->safe_psql('patient', 'SELECT in_flight, pending FROM sb_stat_buffers'), '5|102', "$how: which goes on");
	}
	else
	{
		# These ask the workers to leave, and wait for the handlers.
		my $directory = $node->basedir . '/space';

		mkdir $directory or die $!;
		$node->safe_psql('postgres', "CREATE TABLESPACE space LOCATION '$directory'");
		make_busy_database($_, $file) for qw(doomed old_name original homebody);
		$offset = -s $node->logfile;
		my @statements = map { start_statement($_) } (
			'DROP DATABASE doomed',
			'ALTER DATABASE old_name RENAME TO new_name',
			'CREATE DATABASE duplicate TEMPLATE original',
			'ALTER DATABASE homebody SET TABLESPACE space');
		wait_for_waiting($_, 'Extension') for @statements;
		unlink $file or die $!;
		finish_statement($_) for @statements;

		$node->wait_for_log(qr/$dropped 102 altogether in 2 keys/, $offset);
		pass("$how, DROP DATABASE: the log tells what was dropped");
		for my $database (qw(new_name original homebody patient))
		{
			wait_for_stored($node, $database, 'hits', 107, "$how, database $database: everything is stored");
		}
		is(stored($node, 'duplicate', 'hits'), '5', "$how, database duplicate: has what was stored, and no counts");
		is($node->safe_psql('duplicate', 'SELECT count(*) FROM hits'), '0', "$how, database duplicate: its buffer is empty");
		increment($node, 'duplicate', 'hits', 'k', 3);
		wait_for_stored($node, 'duplicate', 'hits', 8, "$how, database duplicate: and works");
		$node->safe_psql('postgres', "DROP DATABASE $_") for qw(new_name original homebody duplicate patient);
		$node->safe_psql('postgres', 'DROP TABLESPACE space');

		# A handler that takes too long: the statement does not wait for ever,
		# and the buffer goes on.  From 19 on the statement then has the worker
		# terminated, which gives back what it had taken.
		make_busy_database('patient', $file);
		if (major($node) >= 19)
		{
			$node->safe_psql('postgres', 'ALTER DATABASE patient RENAME TO impatient');
			is($node->safe_psql('impatient', 'SELECT count(*) FROM hits_calls'), '0', "$how: a handler takes its time, which ends");
			$node->safe_psql('postgres', 'ALTER DATABASE impatient RENAME TO patient');
			wait_for($node, 'patient', q{SELECT in_flight > 0 AND in_flight + pending = 107 FROM sb_stat_buffers},
				"$how: another worker goes on, with all of it");
		}
		else
		{
			like(error_of('DROP DATABASE patient', $how), qr/is being accessed by other users/, "$how: a handler takes its time");
			is($node->safe_psql('patient', 'SELECT in_flight, pending FROM sb_stat_buffers'), '5|102', "$how: and has it");
		}
		unlink $file or die $!;
		wait_for_stored($node, 'patient', 'hits', 107, "$how: everything is stored");
		append_to_file($file, 'shut');
		increment($node, 'patient', 'hits', 'k', 5);
		wait_for($node, 'patient', q{SELECT in_flight = 5 FROM sb_stat_buffers}, "$how: the handler is in the middle of a call");
		increment($node, 'patient', 'hits', 'k', 2);
		increment($node, 'patient', 'hits', 'other', 100);
	}

	# Who forces it does not wait for the handler.  What that has done is
	# undone with its database.
	$offset = -s $node->logfile;
	$node->safe_psql('postgres', 'DROP DATABASE patient WITH (FORCE)');
	$node->wait_for_log(qr/$dropped 107 altogether in 2 keys/, $offset);
	pass("$how, DROP DATABASE WITH (FORCE): the log tells what was dropped");
	unlink $file;
	return;
}

test_with_servers(\&test_databases);

done_testing();
