
# Copyright (c) 2026, statbuffer developers

# Exactness under chaos: sessions count in every way there is; handlers fail,
# time out, deadlock, fail to serialize and are refused at commit; definitions,
# owners, handlers and the tables that they write to change; processes are
# cancelled and terminated; the server is restarted in the middle of it all.
# Again and again, and in the end, each key's count must be exact: see
# ChaosWorld.pm for how that is known.
#
# This is the short run.  dev/chaos runs it for as long as one likes, with
# these in the environment, each prefixed STATBUFFER_CHAOS_:
#
#	SECONDS		how long
#	SEED		which chaos; brings the same again, if not in the same order
#	PRELOAD		yes or no, or nothing: as it comes at each restart
#	RESTARTS	no, if the server is to be left running
#	RATE		how many transactions a second sessions begin that are left
#				alone; 0 for as many as they can
#	REPORT		a file to write the figures to

use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use FindBin;
use lib $FindBin::RealBin, "$FindBin::RealBin/..";
use ChaosWorld;
use IPC::Run;
use Test::More;
use Time::HiRes qw(time usleep);

sub parameter
{
	my ($name, $default) = @_;
	my $value = $ENV{"STATBUFFER_CHAOS_$name"};

	return defined $value && $value ne '' ? $value : $default;
}

my $seconds = parameter('SECONDS', 40);
my $seed = parameter('SEED', int time);
my $preload = parameter('PRELOAD', '');
my $restarts = parameter('RESTARTS', 'yes') ne 'no';
my $rate = parameter('RATE', 300);
my $report = parameter('REPORT', '');

srand $seed;
note("$seconds seconds, STATBUFFER_CHAOS_SEED=$seed");

# pg_ctl's: handlers may need their time
$ENV{PGCTLTIMEOUT} = 300;

my $node = PostgreSQL::Test::Cluster->new('chaos');
$node->init;
$node->append_conf(
	'postgresql.conf', q{
max_connections = 50
max_worker_processes = 16
shared_buffers = 128MB
max_wal_size = 4GB
deadlock_timeout = 100ms
log_lock_waits = on
log_statement = none
log_min_messages = warning
log_min_error_statement = panic
log_line_prefix = '%m [%p] %b %q%a '
include 'chaos.conf'
});

# What happens is told in a file beside the server's log.
my $diary_file = "$PostgreSQL::Test::Utils::log_path/090_chaos_events.log";
open(my $diary, '>', $diary_file) or die "$diary_file: $!";
$diary->autoflush(1);

my $started = time;
my %done;

sub record
{
	my ($what) = @_;

	printf $diary "%8.3f %s\n", time - $started, $what;
	return;
}

sub sql { return $node->safe_psql('postgres', $_[0]); }

# A number that is, most often, small.
sub few { return int(rand(1) * rand($_[0])); }

sub any { return $_[ int rand @_ ]; }

#
# The server
#

my $is_preloaded;
my $log_read = 0;
my $former_log;
my @crashes;
my @complaints;
my $stored_besides;			# see reckon()

sub write_settings
{
	my ($workers) = @_;
	my $file = $node->data_dir . '/chaos.conf';

	open(my $conf, '>', $file) or die "$file: $!";
	print $conf "shared_preload_libraries = 'statbuffer'\n" if $is_preloaded;
	print $conf "statbuffer.max_workers = $workers\n";
	close $conf;
	return;
}

sub start_server
{
	$is_preloaded =
	    $preload eq 'yes' ? 1
	  : $preload eq 'no' ? 0
	  : int rand 2;
	write_settings(2 + int rand 10);
	record('start, ' . ($is_preloaded ? 'preloaded' : 'not preloaded'));
	$node->start;
	$stored_besides = undef;
	$done{ $is_preloaded ? 'starts, preloaded' : 'starts, not preloaded' }++;
	return;
}

# Looks at what the server's log says since the last time.  Counts deadlocks
# that workers found themselves in.
sub read_log
{
	my $text = slurp_file($node->logfile, $log_read) =~ s/[^\n]*\z//r;

	$log_read += length $text;
	$done{'deadlocks in workers'} +=
	  () = $text =~ /statbuffer worker .*detected deadlock/g;
	push @crashes, grep {
		/PANIC|TRAP|was terminated by signal|all server processes terminated|server process .* exited with exit code [^01]/
	} split /\n/, $text;

	# what a handler raises is told otherwise
	push @complaints, grep { /statbuffer (?:launcher|worker) .*(?:WARNING|ERROR):/ }
	  split /\n/, $text;
	return;
}

# A new one while the server is stopped; that of the last life stays.
sub rotate_log
{
	read_log();
	unlink $former_log if defined $former_log;
	$former_log = $node->logfile;
	$node->rotate_logfile;
	$log_read = 0;
	return;
}

# Processes of the server that are ours, as the operating system tells, and
# not for long: a process is known to be of this server by its parent.
sub our_processes
{
	my $pid_file = $node->data_dir . '/postmaster.pid';
	my @found;
	my $postmaster;

	open(my $file, '<', $pid_file) or return;
	chomp($postmaster = <$file> // '');
	close $file;
	return if $postmaster !~ /^\d+$/;

	foreach my $dir (glob '/proc/[0-9]*')
	{
		my ($stat, $command);

		open(my $in, '<', "$dir/stat") or next;
		$stat = <$in> // '';
		close $in;
		next if $stat !~ /^(\d+) \(.*\) \S (\d+) / || $2 != $postmaster;
		push @found, $1;
		open($in, '<', "$dir/cmdline") or next;
		$command = <$in> // '';
		close $in;
		pop @found if $command !~ /statbuffer (?:launcher|worker)/;
	}
	return @found;
}

#
# The load
#

my $load;
my $load_number = 0;
my $transactions = 0;
my %script = calm_scripts();

foreach my $name (sort keys %script)
{
	append_to_file($node->basedir . "/$name.sql", $script{$name}[1]);
}

# Sessions that are left alone; for some seconds, or until the server stops.
sub start_load
{
	my ($duration) = @_;
	my @command = (
		$node->installed_command('pgbench'), '-n',
		'-M', any('simple', 'extended', 'prepared'),
		# Each its own thread: preparing a statement blocks all of a thread's
		# sessions, and one that waits may wait for another one of them.
		'-c', '6', '-j', '6',
		'-T', $duration > 1 ? int $duration : 1,
		'--random-seed', $seed + $load_number++,
		'-h', $node->host, '-p', $node->port);

	push @command, '-R', $rate if $rate;
	push @command, '-f', $node->basedir . "/$_.sql\@$script{$_}[0]"
	  foreach sort keys %script;
	record('load');
	$load = { out => '', err => '' };
	$load->{run} = IPC::Run::start([ @command, 'postgres' ],
		'<' => \undef, '>' => \$load->{out}, '2>' => \$load->{err});
	return;
}

# Waits for the load's end.  No session that was left alone has met an error,
# other than that the server went away.
sub finish_load
{
	my ($undisturbed) = @_;
	my @errors;

	return if !$load;
	my $ok = $load->{run}->finish;
	@errors = grep {
		/(?:ERROR|FATAL|PANIC):/
		  && ( $undisturbed
			|| !/terminating connection due to administrator command|server is shutting down|system is shutting down|system is starting up|connection to server/
		  )
	} split /\n/, $load->{err};
	ok($ok, 'the sessions that were left alone have come to an end')
	  if $undisturbed;
	is(join("\n", @errors), '', 'no session that was left alone met an error');
	diag($load->{err}) if $undisturbed && !$ok;
	$transactions += $1
	  if $load->{out} =~ /transactions actually processed: (\d+)/;
	$load = undef;
	return;
}

# Sessions to which things happen, and sessions that get in the way of handlers
my %struck;

sub start_struck
{
	foreach my $name ('rough1', 'rough2', 'rough3', 'trouble1', 'trouble2')
	{
		my $file = $node->basedir . "/$name.sql";
		my $text;

		if (exists $struck{$name})
		{
			next if $struck{$name}->pumpable;
			$struck{$name}->finish;
		}
		$text =
		  $name =~ /rough/ ? rough_script(1000) : trouble_script(300);
		open(my $out, '>', $file) or die "$file: $!";
		print $out $text;
		close $out;
		$struck{$name} = IPC::Run::start(
			[
				$node->installed_command('psql'), '-XAtq',
				'-d', $node->connstr('postgres'), '-f', $file
			],
			'<' => '/dev/null',
			'>' => '/dev/null',
			'2>' => '/dev/null');
		$done{'sessions that were not left alone'}++;
	}
	return;
}

# Their clients go away.
sub end_clients
{
	foreach my $run (values %struck, $load ? $load->{run} : ())
	{
		$run->signal('TERM');
	}
	return;
}

sub finish_struck
{
	$_->finish foreach values %struck;
	%struck = ();
	return;
}

#
# What happens
#

# What is to be undone after a while, by name: when, and how.
my %undo;

sub undo_later
{
	my ($name, $how, $within) = @_;

	$undo{$name} = [ time + rand($within // 2), $how ];
	return;
}

# Undoes what is to be undone by now, or all.  One thing may be in the way of
# another, so what does not work is tried again.
sub undo_due
{
	my ($all) = @_;

	foreach my $attempt (1 .. ($all ? 100 : 1))
	{
		foreach my $name (sort keys %undo)
		{
			my ($when, $how) = @{ $undo{$name} };

			delete $undo{$name} if ($all || time >= $when) && $how->();
		}
		return if !%undo;
		usleep(100_000) if $all;
	}
	die 'cannot undo: ' . join(', ', sort keys %undo) if $all;
	return;
}

# Does something to some processes of a kind.
sub strike
{
	my ($what, $function, $condition, $limit) = @_;
	my $n = sql(
		"SELECT count(*) FILTER (WHERE $function(pid))
		 FROM (SELECT pid FROM pg_stat_activity WHERE $condition
			ORDER BY random() LIMIT " . ($limit // 1 + few(3)) . ') p');

	record("$what: $n");
	$done{$what} += $n;
	return $n;
}

# Runs what may fail, and counts what did not.
sub try
{
	my ($what, $statement) = @_;
	my ($status, $out, $err) =
	  $node->psql('postgres', "SET lock_timeout = '2s';\n$statement", on_error_stop => 1);

	$err =~ s/^psql:\S+ //;
	$err =~ s/\n.*//s;
	record("$what: $statement" . ($status == 0 ? '' : " -- $err"));
	$done{$what}++ if $status == 0;
	$done{"$what (refused)"}++ if $status != 0;
	return $status == 0;
}

# As try(), until it works.
sub insist
{
	my ($what, $statement) = @_;

	foreach my $attempt (1 .. 50)
	{
		return if try($what, $statement);
		usleep(100_000);
	}
	die "cannot do: $statement";
}

my @busy = qw(hot wide pairs attempts rough merged);

my $is_worker = "backend_type = 'statbuffer worker'";
my $is_launcher = "backend_type = 'statbuffer launcher'";
my $is_session = "application_name IN ('rough', 'trouble')";

# The handler of "pairs" belongs to a role that a superuser is no member of.
sub new_owner
{
	my $buffer = any(@exact_buffers, 'once', 'shifty');
	my $owner = any(@owners);

	$owner = 'repeater' if $buffer eq 'pairs' && $owner eq 'postgres';
	return try('owners changed', "ALTER FOREIGN TABLE $buffer OWNER TO $owner");
}

sub change_handler
{
	my $name = handler_sql();
	my $plain_name = $name =~ s/\(.*//r;
	my $restore = sub { try('handlers made again', handler_sql($name)) };
	my $way = int rand 5;

	return if exists $undo{$name};
	if ($way == 0)
	{
		try('handlers dropped', "DROP FUNCTION $name")
		  and undo_later($name, $restore);
	}
	elsif ($way == 1)
	{
		$restore->();
	}
	elsif ($way == 2)
	{
		my $owner = $name =~ /pairs/ ? 'handlers' : 'postgres';

		try('handlers given to strangers',
			"ALTER FUNCTION $name OWNER TO stranger")
		  and undo_later(
			$name,
			sub {
				try('handlers taken back',
					"ALTER FUNCTION $name OWNER TO $owner");
			});
	}
	elsif ($way == 3)
	{
		try('handlers forbidden', "REVOKE EXECUTE ON FUNCTION $name FROM PUBLIC")
		  and undo_later(
			$name,
			sub {
				try('handlers allowed',
					"GRANT EXECUTE ON FUNCTION $name TO PUBLIC");
			});
	}
	else
	{
		# another one that is better: it takes arrays
		return if exists $undo{wide_arrays};
		try('handlers that take arrays added',
			"CREATE FUNCTION store_wide(keys int[], counts bigint[]) RETURNS boolean
			 LANGUAGE sql AS \$\$ SELECT store('wide', keys::text[], counts) \$\$")
		  and undo_later(
			'wide_arrays',
			sub {
				try('handlers that take arrays dropped',
					'DROP FUNCTION store_wide(int[], bigint[])');
			});
	}
	return;
}

sub change_role
{
	my $role = any(@owners[ 1 .. $#owners ]);
	my $setting = any(
		"default_transaction_isolation = 'serializable'",
		"default_transaction_isolation = 'repeatable read'",
		"default_transaction_isolation = 'read committed'",
		"lock_timeout = '50ms'",
		"statement_timeout = '50ms'",
		"default_transaction_read_only = on",
		"default_transaction_deferrable = on",
		"synchronous_commit = off",
		"work_mem = '64kB'",
		"search_path = pg_catalog");

	if (rand() < 0.2)
	{
		my ($out, $in) = @{
			any(
				[ 'NOLOGIN', 'LOGIN' ],
				[ 'CONNECTION LIMIT 0', 'CONNECTION LIMIT -1' ])};

		return if exists $undo{"$role login"};
		try('roles locked out', "ALTER ROLE $role $out");
		undo_later("$role login",
			sub { try('roles let in again', "ALTER ROLE $role $in") });
	}
	else
	{
		try('settings of roles changed', "ALTER ROLE $role SET $setting");
		undo_later(
			"$role settings",
			sub {
				try('settings of roles reset', "ALTER ROLE $role RESET ALL;"
					  . ( $role eq 'repeater' ? "ALTER ROLE $role SET default_transaction_isolation = 'repeatable read'"
						: $role eq 'serializer' ? "ALTER ROLE $role SET default_transaction_isolation = 'serializable'"
						: ''));
			})
		  if $setting =~ /read_only|search_path|timeout/
		  && !exists $undo{"$role settings"};
	}

	# It is a worker's next one that has the settings.
	strike('workers terminated', 'pg_terminate_backend',
		"$is_worker AND usename = '$role'", 2);
	return;
}

# A buffer that is not compared is made, counted in, truncated or dropped.
sub change_fleeting
{
	my $way = int rand 4;

	if ($way == 0)
	{
		try('buffers made',
			"CREATE FOREIGN TABLE fleeting (key int NOT NULL, n bigint NOT NULL)
			 SERVER statbuffer OPTIONS (handler 'store_fleeting', interval '"
			  . few(5000)
			  . "ms');
			 SELECT sb_increment(g, 1, 'fleeting') FROM generate_series(1, 5000) AS g");
	}
	elsif ($way == 1)
	{
		try('buffers truncated', 'TRUNCATE fleeting');
	}
	else
	{
		try('buffers dropped', 'DROP FOREIGN TABLE fleeting');
	}
	return;
}

# A database that has counts of its own is made or dropped.
sub change_database
{
	if (try('databases made', 'CREATE DATABASE fleeting TEMPLATE template_chaos'))
	{
		$node->psql('fleeting',
			'INSERT INTO fleeting SELECT g, 1 FROM generate_series(1, 5000) AS g');
	}
	else
	{
		try('databases dropped',
			"LOAD 'statbuffer'; DROP DATABASE fleeting" . any('', ' WITH (FORCE)'));
	}
	return;
}

# Each with how often it happens, in relation to the others.
my @events = (
	[ 10, sub { strike('workers terminated', 'pg_terminate_backend', $is_worker) } ],
	[ 10, sub { strike('workers cancelled', 'pg_cancel_backend', $is_worker) } ],
	[ 1, sub { strike('workers terminated', 'pg_terminate_backend', $is_worker, 20) } ],
	[ 3, sub { strike('launchers cancelled', 'pg_cancel_backend', $is_launcher) } ],
	[ 20, sub { strike('sessions cancelled', 'pg_cancel_backend', $is_session) } ],
	[ 10, sub { strike('sessions terminated', 'pg_terminate_backend', $is_session) } ],
	[
		10,
		sub {
			my ($option, $value) = random_option();

			try('options changed',
				'ALTER FOREIGN TABLE ' . any(@busy) . " OPTIONS (SET $option '$value')");
		}
	],
	[ 5, \&new_owner ],
	[ 5, \&change_role ],
	[ 5, \&change_handler ],
	[ 4, \&change_fleeting ],
	[ 1, \&change_database ],
	[
		5,
		sub {
			try('flushes asked for', "SELECT sb_flush_all('" . any(@busy) . "')");
		}
	],
	[
		3,
		sub {
			try('flushes asked for',
				"SELECT sb_flush(g, 'wide'), sb_flush('hot ' || g % 4, 'hot')
				 FROM generate_series(1, 100) AS g");
		}
	],
	[
		3,
		sub {
			try('drains', "SELECT sb_drain('" . any(@busy) . "', '500ms')");
		}
	],
	[
		3,
		sub {
			try('drains cut off',
				"SET statement_timeout = '20ms'; SELECT sb_drain('" . any(@busy) . "')");
		}
	],
	[
		3,
		sub {
			return if exists $undo{stopped};
			try('buffers stopped', "SELECT sb_stop('rough')");
			undo_later('stopped',
				sub { try('buffers started', "SELECT sb_start('rough')") });
		}
	],
	[
		1,
		sub {
			return if exists $undo{renamed};
			try('buffers renamed', 'ALTER FOREIGN TABLE rough RENAME TO smooth')
			  and undo_later(
				'renamed',
				sub {
					try('buffers renamed',
						'ALTER FOREIGN TABLE smooth RENAME TO rough');
				},
				0.5);
		}
	],
	[
		1,
		sub {
			try('key columns altered',
				'ALTER FOREIGN TABLE shifty ALTER key TYPE ' . any('int', 'bigint'));
		}
	],
	[
		2,
		sub {
			return if exists $undo{gate};
			try('gates closed', 'BEGIN; DELETE FROM passed; DELETE FROM gate; COMMIT')
			  and undo_later('gate',
				sub { try('gates opened', 'INSERT INTO gate VALUES (1)') });
		}
	],
	[
		2,
		sub {
			return if exists $undo{mood};
			try('moods changed',
				'UPDATE mood SET failing = ' . rand(1) . ', slow = ' . rand(0.1));
			undo_later(
				'mood',
				sub {
					try('moods changed',
						'UPDATE mood SET failing = 0.05, slow = 0.01');
				});
		}
	],
	[
		1,
		sub {
			write_settings(1 + few(10));
			$node->reload;
			record('settings reloaded');
			$done{'settings reloaded'}++;
		}
	]);
my $weight = 0;
$weight += $_->[0] foreach @events;

sub cause_event
{
	my $draw = rand $weight;

	foreach my $event (@events)
	{
		$draw -= $event->[0];
		next if $draw > 0;
		$event->[1]->();
		$done{events}++;
		return;
	}
	return;
}

#
# The reckoning
#

my $keys_off = 0;

# Compares each key, while everything goes on.
sub reckon
{
	my ($when) = @_;
	my ($status, $out, $err);

	# who waits for all these locks may be found in a deadlock
	foreach my $attempt (1 .. 10)
	{
		($status, $out, $err) = $node->psql('postgres', balance_sql(),
			extra_params => ['--single-transaction'], on_error_stop => 1);
		last if $status == 0 || $err !~ /deadlock detected/;
		record('deadlock at the reckoning');
	}
	if ($status != 0)
	{
		record(sql('SELECT pid, backend_type, pg_blocking_pids(pid), state, wait_event, query FROM pg_stat_activity'));
		die "cannot reckon: $err";
	}

	# what was stored when the server started is not in its statistics
	my @lines = split /\n/, $out;
	my $besides = join "\n", grep { /^=/ } @lines;
	my @off = grep { !/^=/ } @lines;

	$stored_besides //= $besides;
	$done{reckonings}++;
	read_log();
	record("reckoning $when: "
		  . (@off ? 'OFF' : $besides ne $stored_besides ? 'statistics are off' : 'exact'));
	record("  $_") foreach @off;
	$keys_off += @off;
	$#off = 19 if @off > 20;
	is(join("\n", @off),
		'', "$when, each key has what the ledger says, to the last one");
	is($besides, $stored_besides, 'and the statistics agree')
	  if $besides ne $stored_besides;
	return;
}

# Statistics are of one life of the server.
sub add_statistics
{
	foreach my $row (split /\n/,
		sql('SELECT buffer::text, increments, flushed_keys, handler_calls, failures, discarded FROM sb_stat_buffers'))
	{
		my ($buffer, $increments, $keys, $calls, $failures, $discarded) =
		  split /\|/, $row;

		$done{'keys stored'} += $keys;
		$done{'calls of handlers'} += $calls;
		$done{'failures of keys and buffers'} += $failures;
	}
	return;
}

#
# Shutdowns
#

# Terminates and cancels what there is of ours, in a server that is stopping.
sub strike_while_stopping
{
	my ($until) = @_;

	while (time < $until && -e $node->data_dir . '/postmaster.pid')
	{
		foreach my $pid (our_processes())
		{
			next if rand() < 0.5;
			$done{'struck while the server stopped'} +=
			  kill(any('TERM', 'INT'), $pid);
		}
		usleep(int rand 50_000);
	}
	return;
}

# Stops the server, which may be stopping already.
sub complete_stop
{
	my ($mode) = @_;

	foreach my $attempt (1 .. 3)
	{
		$node->stop($mode, fail_ok => 1);
		return if !-e $node->data_dir . '/postmaster.pid';
	}
	BAIL_OUT('the server does not stop');
	return;
}

sub begin_stop
{
	my ($mode) = @_;

	system_log('pg_ctl', '-D', $node->data_dir, '-m', $mode, '-W', 'stop');
	return;
}

my @stops = (
	[
		'fast',
		4,
		sub { complete_stop('fast') }
	],
	[
		'fast, just after the launcher was terminated',
		2,
		sub {
			strike('launchers terminated', 'pg_terminate_backend', $is_launcher);
			usleep(int rand 100_000) if int rand 2;
			complete_stop('fast');
		}
	],
	[
		'fast, while ours are terminated and cancelled',
		3,
		sub {
			begin_stop('fast');
			strike_while_stopping(time + rand 3);
			complete_stop('fast');
		}
	],
	[
		# nobody is left who knows of the counts
		'fast, just after everybody of ours was terminated',
		1,
		sub {
			end_clients();
			sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity
				 WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()");
			strike('launchers terminated', 'pg_terminate_backend', $is_launcher);
			foreach my $attempt (1 .. 20)
			{
				last if !strike('workers terminated',
					'pg_terminate_backend', "$is_worker OR $is_launcher", 20);
				usleep(20_000);
			}
			usleep(int rand 100_000) if int rand 2;
			complete_stop('fast');
		}
	],
	[
		'smart',
		1,
		sub {
			begin_stop('smart');
			usleep(int rand 1_500_000);
			end_clients();
			complete_stop('smart');
		}
	],
	[
		'smart, while ours are terminated and cancelled',
		1,
		sub {
			begin_stop('smart');
			strike_while_stopping(time + rand 1);
			end_clients();
			strike_while_stopping(time + rand 1);
			complete_stop('smart');
		}
	],
	[
		'smart, then fast',
		1,
		sub {
			begin_stop('smart');
			usleep(int rand 1_000_000);
			complete_stop('fast');
		}
	]);

sub restart_server
{
	my @choice = map { ($_) x $_->[1] } @stops;
	my ($how, undef, $stop) = @{ any(@choice) };

	add_statistics();
	record("stop: $how");
	$stop->();
	record('stopped');
	$done{"restarts: $how"}++;
	$done{restarts}++;
	finish_load(0);
	finish_struck();
	rotate_log();
	start_server();

	# at once, before anything was loaded or counted
	if (rand() < 0.2)
	{
		record('stop again');
		complete_stop('fast');
		$done{'restarts: at once after a start'}++;
		$done{restarts}++;
		start_server();
	}
	reckon('after a restart') if int rand 2;
	return;
}

#
# Peace
#

# All that goes wrong ends, and all that is held is stored.
sub make_peace
{
	reckon('before the peace');

	undo_due(1);
	sql('UPDATE mood SET failing = 0, slow = 0, stuck = false');
	foreach my $role (@owners[ 1 .. $#owners ])
	{
		sql("ALTER ROLE $role RESET ALL");
	}
	strike('workers terminated', 'pg_terminate_backend', $is_worker, 100);

	foreach my $buffer (@exact_buffers, 'once')
	{
		is(sql("SELECT sb_drain('$buffer', '180s')"), 't', "$buffer is drained");
	}
	# As long as keys of one type are held, those of the other can't be stored.
	my $drained = 'f';
	foreach my $attempt (1 .. 60)
	{
		insist('key columns altered',
			'ALTER FOREIGN TABLE shifty ALTER key TYPE ' . ($attempt % 2 ? 'int' : 'bigint'));
		$drained = sql("SELECT sb_drain('shifty', '3s')");
		last if $drained eq 't';
	}
	is($drained, 't', 'shifty is drained of its keys of either type');
	is(sql('SELECT count(*) FROM held'), '0', 'nothing is held after the drains');
	reckon('in the end');
	is( sql(
			"SELECT coalesce(key, 'none'), b.n, s.n FROM (SELECT * FROM books WHERE buffer = 'shifty') b
			 FULL JOIN (SELECT * FROM stored WHERE buffer = 'shifty') s USING (key)
			 WHERE b.n IS DISTINCT FROM s.n"),
		'',
		'so have the keys whose type was altered');
	is( sql("SELECT count(*) FROM stored WHERE key = 'undone' AND buffer = 'hot'"),
		'0', 'nothing that was rolled back is stored');

	is( sql(
			"SELECT buffer, state, last_error FROM sb_stat_buffers
			 WHERE state NOT IN ('running', 'idle') AND buffer::text <> 'fleeting'"),
		'',
		'no buffer fails any more');
	is( sql(
			"SELECT count(*) FROM sb_keys('wide') WHERE failures > 0 OR last_error IS NOT NULL"
		),
		'0',
		'nor does any key');

	# It counts as ever.
	sql("SELECT sb_increment(k, 1, 'wide') FROM generate_series(1, 100) AS k");
	is(sql("SELECT sb_drain('wide', '180s')"), 't', 'counting goes on');
	return;
}

#
# The story
#

$is_preloaded = 0;
start_server();
sql(world_sql());
sql(q{
	CREATE DATABASE template_chaos;
	\c template_chaos
	CREATE EXTENSION statbuffer;
	CREATE FUNCTION store_fleeting(key int, count bigint) RETURNS void LANGUAGE sql AS '';
	CREATE FOREIGN TABLE fleeting (key int NOT NULL, n bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store_fleeting', interval '2s')});
$done{$_} = 0
  foreach ('workers terminated', 'workers cancelled', 'launchers terminated',
	'launchers cancelled', 'sessions terminated', 'sessions cancelled',
	'struck while the server stopped', 'keys stored', 'events', 'reckonings', 'restarts',
	'deadlocks in workers');

my $end = time + $seconds;
my $strike_launcher = time + 5;
my $next_restart = time + 5 + rand 10;
my $next_reckoning = time + 3;
my $next_note = time + 10;

start_load($end - time);
while (time < $end && !$keys_off)
{
	start_struck();
	undo_due();
	cause_event();

	# It comes back after five seconds, and flushes go on for some more.
	if (time >= $strike_launcher)
	{
		strike('launchers terminated', 'pg_terminate_backend', $is_launcher);
		$strike_launcher = time + 10 + rand 20;
	}
	if (time >= $next_reckoning)
	{
		reckon(sprintf 'after %d s', time - $started);
		$next_reckoning = time + 2 + rand 8;
	}
	if ($restarts && !$keys_off && time >= $next_restart && time < $end - 3)
	{
		restart_server();
		last if $keys_off;
		start_load($end - time);
		$next_restart = time + 5 + rand 20;
	}
	if (time >= $next_note)
	{
		record("so far: $done{reckonings} reckonings, $done{restarts} restarts,"
			  . " $keys_off keys off");
		$next_note = time + 10;
	}
	usleep(50_000);
}

#
# Peace, and the reckoning
#

record('peace');
finish_load(!$keys_off);
sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE $is_session");
finish_struck();
$node->poll_query_until('postgres',
	"SELECT count(*) FROM pg_stat_activity WHERE $is_session", '0')
  or die 'sessions do not end';
add_statistics();

# What is off is looked at as it is.
make_peace() if !$keys_off;

read_log();
is(join("\n", @crashes), '', 'the server never crashed');
is(join("\n", @complaints), '', 'neither the launcher nor a worker met an error of its own');

# What the chaos was like
my ($sum, $entries, $keys) = split /\|/,
  sql('SELECT sum(n), sum(entries), count(*) FROM books');
my ($attempts, $doubtful) = split /\|/, sql(doubtful_sql());
my %failures = map { $_ => sql(
		"SELECT coalesce(pg_sequence_last_value('failed_$_'), 0)") }
  @failure_kinds;
my @figures = (
	[ 'seconds', int(time - $started) ],
	[ 'seed', $seed ],
	[ 'transactions of sessions that were left alone', $transactions ],
	[ 'increments reconciled', $entries ],
	[ 'which add up to', $sum ],
	[ 'in so many keys', $keys ],
	[ 'asynchronous increments reconciled', $attempts ],
	[ '  sessions cut off in the middle of one', $doubtful ],
	[ 'keys off', $keys_off ],
	(map { [ $_, $done{$_} ] } sort keys %done),
	(map { [ "handlers failed: $_", $failures{$_} ] } @failure_kinds));
my $table = join '', map { sprintf "%-52s %s\n", @$_ } @figures;

note($_) foreach split /\n/, $table;
append_to_file($report, $table) if $report;

# and was it one?  On a slow machine there is not everything in a short time.
if (!$keys_off)
{
	cmp_ok($entries, '>', 0, 'there were increments');
	cmp_ok($done{'keys stored'}, '>', 0, 'there was something stored');
	cmp_ok($done{events}, '>', 0, 'there were events');
}
if (!$keys_off && $done{events} >= 500)
{
	foreach my $what (
		'workers terminated', 'workers cancelled', 'launchers terminated',
		'sessions cancelled', 'sessions terminated', $restarts ? 'restarts' : ())
	{
		cmp_ok($done{$what}, '>', 0, "there were $what");
	}
	foreach my $kind (@failure_kinds)
	{
		cmp_ok($failures{$kind}, '>', 0,
			"there were handlers that failed: $kind");
	}
}

$node->stop('fast');

done_testing();
